"""The reward of self-critical training."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from captioning.learning.reward import CiderD
from vocabulary import END, PAD, START, UNK

WORDS = 12  # few, so that n-grams repeat within and between captions


def pycocoevalcap(references, samples):
    """The CIDEr-D of the i-th sample with the references of the i-th image."""
    truth = {i: [" ".join(map(str, ids)) for ids in texts] for i, texts in enumerate(references)}
    candidates = {i: [" ".join(map(str, ids))] for i, ids in enumerate(samples)}
    return Cider().compute_score(truth, candidates)[1]


def random_caption(rng, ended=True, longest=14):
    return [*rng.integers(UNK, WORDS, rng.integers(0, longest)).tolist(), *[END] * ended]


def test_equals_pycocoevalcap():
    """With the same references and frequencies, the score of every caption is pycocoevalcap's.

    Among the captions are empty ones, some without `<end>`, and copies of references; `<pad>` and
    `<start>` are ignored.
    """
    rng = np.random.default_rng(0)
    references = [[random_caption(rng) for _ in range(rng.integers(1, 6))] for _ in range(40)]
    samples = [random_caption(rng, ended=i % 3 > 0) for i in range(40)]
    samples[7], samples[8], samples[9] = references[7][0], [END], [5] * 6
    padded = [[[START, *ids, PAD, PAD] for ids in texts] for texts in references]
    found = CiderD(padded)([[[*ids, PAD]] for ids in samples], padded)
    assert found.shape == (40, 1) and found.max() > 1
    assert found[:, 0] == pytest.approx(pycocoevalcap(references, samples), abs=1e-6)


def test_batches_change_nothing():
    """A caption has the same score in any batch: frequencies are those of all references."""
    rng = np.random.default_rng(1)
    references = [[random_caption(rng) for _ in range(3)] for _ in range(10)]
    samples = [[random_caption(rng), random_caption(rng)] for _ in range(10)]
    score, order = CiderD(references), [7, 2, 7]
    expected = score(samples, references)
    found = score([samples[i] for i in order], [references[i] for i in order])
    assert found == pytest.approx(expected[order]) and expected.max() > 0


def test_by_hand():
    """Four images with one reference each, and unigrams only: 10 times the cosine of tf-idf.

    `<end>` and word 4 are in all images and have weight 0, word 5 is in two: log(4/2), and 6 and
    7 are in one: log(4).
    """
    references = [[[4, 5, 6, END]], [[4, 5, 7, END]], [[4, END]], [[4, END]]]
    half, quarter = np.log(2), np.log(4)
    expected = 10 * half**2 / (half**2 + quarter**2)  # words 5 and 7 against 5 and 6
    found = CiderD(references, n=1)([[[4, 5, 7, END], [4, 5, 6, END]]], references[:1])
    assert found[0] == pytest.approx([expected, 10])


def test_reward_of_a_single_image():
    """With the captions of one image every reward would be 0, which is refused."""
    with pytest.raises(ValueError, match="at least two training images"):
        CiderD([[[1, 4, 2]]])
