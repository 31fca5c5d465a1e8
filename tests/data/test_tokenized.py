"""The cache of tokenized captions."""

import numpy as np
import pytest

from captioning.data import tokenized as module
from captioning.data.tokenized import tokenize_all
from vocabulary import Vocabulary

MANY = ["A dog runs.", "", "a dog's ball", "?!", "the old red bus"]


@pytest.fixture(params=["computed", "cached"])
def tokenized(request, tmp_path, monkeypatch):
    """MANY tokenized, or loaded from the cache when they can no longer be tokenized."""
    if request.param == "cached":
        tokenize_all(MANY, tmp_path)
        monkeypatch.setattr(module, "tokenize", None)
    return tokenize_all(MANY, tmp_path if request.param == "cached" else None)


def test_encode_tokenized(tokenized):
    """Tokenized captions are encoded as each of them is by `Vocabulary.encode`."""
    vocab = Vocabulary.build(["a dog", "the dog's bus"], threshold=1)
    ids, lengths = tokenized.encode(vocab)
    expected = [vocab.encode(caption) for caption in MANY]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert ids.tolist() == [index for ids in expected for index in ids]


@pytest.mark.parametrize("threshold", [1, 2])
def test_vocabulary_from_counts(tokenized, threshold):
    """The counts of tokenized captions give the vocabulary of the captions."""
    words = Vocabulary.from_counts(tokenized.counts(), threshold).words
    assert words == Vocabulary.build(MANY, threshold).words


def test_tokenized_without_words(tmp_path):
    """Captions without a single word can be tokenized, kept and loaded."""
    for _ in range(2):
        tokenized = tokenize_all(["", "?"], tmp_path)
        assert tokenized.counts() == {} and tokenized.lengths.tolist() == [0, 0]


def test_cache_of_other_captions(tmp_path):
    """Cached captions are not used in place of others with the same words."""
    tokenize_all(["a dog", "a cat"], tmp_path)
    assert tokenize_all(["a dog a", "cat"], tmp_path).lengths.tolist() == [3, 1]


@pytest.mark.parametrize("damage", ["a byte", "truncated", "empty", "text"])
def test_damaged_cache(tmp_path, damage):
    """A damaged cache file is replaced."""
    right = tokenize_all(MANY, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"NUMPY") + 150] ^= 1
    damaged = {"a byte": flipped, "truncated": content[:-40], "empty": b"", "text": b"words"}
    path.write_bytes(damaged[damage])
    again = tokenize_all(MANY, tmp_path)
    assert again.words == right.words
    np.testing.assert_array_equal(again.ids, right.ids)
    np.testing.assert_array_equal(again.lengths, right.lengths)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size == len(content)
