"""Words and their numbers: how a caption becomes the integers an LSTM can read, and back.

vocab = Vocabulary.build(training_captions, threshold=5)
vocab.encode("A dog runs.")     # [1, 4, 17, 92, 2]: <start> a dog runs <end>
vocab.decode([4, 17, 92, 2])    # "a dog runs"
vocab.save("vocabulary.json"); vocab = Vocabulary.load("vocabulary.json")

packed = pack(training_captions, "runs/cache")     # tokenised once; from the cache ever after
vocab = Vocabulary.from_counts(packed.counts(), threshold=5)
ids, lengths = vocab.encode_all(packed)
"""

import contextlib
import hashlib
import json
import os
import unicodedata
import uuid
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nltk.tokenize import RegexpTokenizer

SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")  # the first words of every vocabulary
PAD, START, END, UNK = range(4)  # their indices

# A word is a run of letters and digits, held together by inner hyphens and apostrophes ("t-shirt",
# "don't"); the possessive 's is a word of its own, as in the Penn Treebank, so that "dog's" does
# not need a place beside "dog". Everything else separates: "half.eaten" is two words.
WORD = RegexpTokenizer(r"[^\W_]+(?:['-](?!s\b)[^\W_]+)*|'s\b")
TOKENIZER = "nltk RegexpTokenizer: lower case, no punctuation, possessive 's split off"


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation; needs no nltk data download.

    >>> tokenize("A man's T-shirt, half-eaten.Pizza -- 2 cafés!")
    ['a', 'man', "'s", 't-shirt', 'half-eaten', 'pizza', '2', 'cafés']
    """
    # NFC makes one letter of "e" + combining accent; typographic apostrophes and hyphens count too.
    text = unicodedata.normalize("NFC", caption).lower()
    return WORD.tokenize(text.replace("\u2019", "'").replace("\u2010", "-"))


@dataclass
class Packed:
    """The words of many captions in three arrays, which a disk and numpy handle in no time."""

    words: list[str]  # the different ones
    ids: np.ndarray  # (all words of all captions,) int32: places in `words`, caption after caption
    lengths: np.ndarray  # (captions,) int32

    def counts(self) -> dict[str, int]:
        """How often each word occurs."""
        return dict(zip(self.words, np.bincount(self.ids).tolist(), strict=True))


def pack(captions: list[str], cache_dir=None) -> Packed:
    """Tokenise captions, or find them tokenised in `cache_dir`, where they are kept.

    The file's name is a fingerprint of the captions and the tokenizer; a damaged one is replaced.
    """
    if cache_dir is None:
        return _pack(captions)
    digest = hashlib.sha256(json.dumps([TOKENIZER, *captions]).encode())
    path = Path(cache_dir) / f"captions-{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(path) as file:  # never a pickle; a zip, so that its checksums find damage
            words = file["words"].tobytes().decode()
            return Packed(words.split("\n") if words else [], file["ids"], file["lengths"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        packed = _pack(captions)
    words = np.frombuffer("\n".join(packed.words).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.savez(file, words=words, ids=packed.ids, lengths=packed.lengths)
    return packed


@contextlib.contextmanager
def whole_file(path: Path):
    """A file to write into, which appears as `path` whole or not at all. Raises OSError."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # several processes may be at it
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): is the disk full?") from None
    finally:
        part.unlink(missing_ok=True)


def _pack(captions) -> Packed:
    place, ids, lengths = {}, [], []
    for caption in captions:
        words = tokenize(caption)
        ids += [place.setdefault(word, len(place)) for word in words]
        lengths.append(len(words))
    return Packed(list(place), np.array(ids, np.int32), np.array(lengths, np.int32))


class Vocabulary:
    """A fixed list of words, each known by its index; words outside it share `<unk>`."""

    def __init__(self, words: list[str], threshold: int = 1):
        """`words` starts with the four specials; `threshold` only records how it was built."""
        if tuple(words[: len(SPECIALS)]) != SPECIALS:
            raise ValueError(f"a vocabulary starts with {', '.join(SPECIALS)}, not {words[:4]}")
        if not all(isinstance(word, str) and word for word in words):
            raise ValueError("every word of a vocabulary is a non-empty string")
        if len(set(words)) != len(words):
            raise ValueError("a vocabulary lists every word once, this one repeats some")
        self.words = list(words)
        self.threshold = threshold
        self.index = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions, threshold: int = 5) -> "Vocabulary":
        """Every word that occurs at least `threshold` times in `captions` (training ones only).

        Words are ordered by falling count, then alphabetically, so that the order of the captions
        does not matter. Raises ValueError if no word is left.
        """
        counts = Counter(word for caption in captions for word in tokenize(caption))
        return cls.from_counts(counts, threshold)

    @classmethod
    def from_counts(cls, counts: dict[str, int], threshold: int = 5) -> "Vocabulary":
        """As `build`, from the number of times each word occurs."""
        kept = [word for word, count in counts.items() if count >= threshold]
        if not kept:
            raise ValueError(
                f"the vocabulary is empty: none of {len(counts)} different words occurs "
                f"{threshold} times or more; lower the threshold or add captions"
            )
        kept.sort(key=lambda word: (-counts[word], word))
        return cls([*SPECIALS, *kept], threshold)

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, word: str) -> int:
        """The index of `word`, or that of `<unk>`."""
        return self.index.get(word, UNK)

    def encode(self, caption: str) -> list[int]:
        """The indices of a caption's words, from `<start>` to `<end>`."""
        return [START, *(self(word) for word in tokenize(caption)), END]

    def encode_all(self, packed: Packed):
        """As `encode`, for many captions, one after the other: (indices, length of each caption).

        The lengths include `<start>` and `<end>`.
        """
        lengths = packed.lengths.astype(np.int64) + 2
        ends = np.cumsum(lengths)
        ids = np.empty(lengths.sum(), np.int32)
        is_word = np.ones(len(ids), bool)
        is_word[ends - lengths] = is_word[ends - 1] = False
        ids[ends - lengths], ids[ends - 1] = START, END
        ids[is_word] = np.array([self(word) for word in packed.words], np.int32)[packed.ids]
        return ids, lengths

    def decode(self, ids) -> str:
        """The words of `ids` (integers or a tensor) up to `<end>`; `<pad>`, `<start>` are left out.

        Raises IndexError for an index outside the vocabulary.
        """
        words = []
        for index in map(int, ids):
            if index == END:
                break
            if not 0 <= index < len(self):
                raise IndexError(f"no word has index {index}: this vocabulary has {len(self)}")
            if index not in (PAD, START):
                words.append(self.words[index])
        return " ".join(words)

    def save(self, path) -> None:
        """Write the vocabulary as JSON; the file appears whole or not at all."""
        content = {"threshold": self.threshold, "words": self.words}
        text = json.dumps(content, ensure_ascii=False, indent=0)
        with whole_file(Path(path)) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path) -> "Vocabulary":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["words"], int(content["threshold"]))
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no vocabulary at {path}; train first") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a vocabulary written by Vocabulary.save ({error}); "
                "delete it and build it again from the training captions"
            ) from None
