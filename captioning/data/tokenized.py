"""The words of many captions as arrays, tokenized once and kept on disk."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.base.files import atomic_write
from captioning.base.tokens import END, START, TOKENIZER, tokenize


@dataclass
class TokenizedCaptions:
    """The words of many captions in three arrays, which are fast to load and to map to indices."""

    words: list[str]  # the distinct words
    ids: np.ndarray  # (total number of words,) int32: indices into `words`, caption after caption
    lengths: np.ndarray  # (captions,) int32, in words

    def counts(self) -> dict[str, int]:
        """How often each word occurs."""
        return dict(zip(self.words, np.bincount(self.ids).tolist(), strict=True))

    def encode(self, vocab):
        """`vocab.encode` of every caption: (all indices, caption after caption; the lengths).

        The lengths include `<start>` and `<end>`.
        """
        lengths = self.lengths.astype(np.int64) + 2
        ends = np.cumsum(lengths)
        ids = np.empty(lengths.sum(), np.int32)
        is_word = np.ones(len(ids), bool)
        is_word[ends - lengths] = is_word[ends - 1] = False
        ids[ends - lengths], ids[ends - 1] = START, END
        ids[is_word] = np.array([vocab(word) for word in self.words], np.int32)[self.ids]
        return ids, lengths


def tokenize_all(captions: list[str], cache_dir=None) -> TokenizedCaptions:
    """Tokenize captions, or load the tokenized captions from `cache_dir`, where they are kept.

    The file name contains a hash of the captions and the tokenizer; a damaged file is replaced.
    """
    if cache_dir is None:
        return _tokenize_all(captions)
    digest = hashlib.sha256(json.dumps([TOKENIZER, *captions]).encode())
    path = Path(cache_dir) / f"captions-{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(path) as file:  # a zip file, whose checksums detect damage; never a pickle
            words = file["words"].tobytes().decode()
            return TokenizedCaptions(
                words.split("\n") if words else [], file["ids"], file["lengths"]
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        tokenized = _tokenize_all(captions)
    words = np.frombuffer("\n".join(tokenized.words).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, words=words, ids=tokenized.ids, lengths=tokenized.lengths)
    return tokenized


def _tokenize_all(captions) -> TokenizedCaptions:
    index, ids, lengths = {}, [], []
    for caption in captions:
        words = tokenize(caption)
        ids += [index.setdefault(word, len(index)) for word in words]
        lengths.append(len(words))
    return TokenizedCaptions(list(index), np.array(ids, np.int32), np.array(lengths, np.int32))
