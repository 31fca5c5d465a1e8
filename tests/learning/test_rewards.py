"""The reward of self-critical training."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from captioning.learning.reward import CiderD
from vocabulary import END, PAD, START, UNK

WORDS = 12  # few, so that n-grams repeat within and between captions


def padded(captions, start=False):
    """Lists of ids -> (B, T), with `<start>` in front if `start`."""
    captions = [[START] * start + caption for caption in captions]
    matrix = np.full((len(captions), max(map(len, captions))), PAD)
    for row, caption in zip(matrix, captions, strict=True):
        row[: len(caption)] = caption
    return matrix


def scorer(references, with_end, vocab_size=WORDS, **options):
    """CiderD with the frequencies of `references`: for each image a list of lists of ids."""
    flat = [[START, *reference] for texts in references for reference in texts]
    image = np.repeat(np.arange(len(references)), [len(texts) for texts in references])
    ids = np.concatenate([np.array(reference) for reference in flat])
    return CiderD(ids, [len(r) for r in flat], image, vocab_size, with_end=with_end, **options)


def rewards(score, samples, sample_image, references, images):
    """The reward of samples, given the references of `images` alone."""
    flat = [reference for image in images for reference in references[image]]
    reference_image = np.repeat(images, [len(references[image]) for image in images])
    return score(padded(samples), np.array(sample_image), padded(flat, start=True), reference_image)


def pycocoevalcap(references, samples, with_end):
    """The CIDEr-D of the i-th sample with the references of the i-th image."""

    def text(ids):
        return " ".join(str(i) for i in ids if with_end or i != END)

    truth = {image: [text(r) for r in texts] for image, texts in enumerate(references)}
    return Cider().compute_score(truth, {i: [text(s)] for i, s in enumerate(samples)})[1]


def random_caption(rng, ended=True, longest=14):
    return [*rng.integers(UNK, WORDS, rng.integers(0, longest)).tolist(), *[END] * ended]


@pytest.mark.parametrize("with_end", [True, False])
def test_equals_pycocoevalcap(with_end):
    """With the same references and frequencies, the score of every caption is pycocoevalcap's.

    Among the captions are empty ones, some without `<end>`, and copies of references.
    """
    rng = np.random.default_rng(0)
    references = [[random_caption(rng) for _ in range(rng.integers(1, 6))] for _ in range(40)]
    samples = [random_caption(rng, ended=i % 3 > 0) for i in range(40)]
    samples[7], samples[8], samples[9] = references[7][0], [END], [5] * 6
    score = scorer(references, with_end)
    found = rewards(score, samples, range(40), references, list(range(40)))
    assert found == pytest.approx(pycocoevalcap(references, samples, with_end), abs=1e-6)
    assert found.max() > 1


def test_batches_change_nothing():
    """A caption has the same score in any batch: frequencies are those of all references."""
    rng = np.random.default_rng(1)
    references = [[random_caption(rng) for _ in range(3)] for _ in range(10)]
    samples = [random_caption(rng) for _ in range(10)]
    score = scorer(references, True)
    expected = rewards(score, samples, range(10), references, list(range(10)))
    order = [7, 2, 7]
    found = rewards(score, [samples[i] for i in order], order, references, [2, 7])
    assert found == pytest.approx(expected[order]) and expected.max() > 0


def test_by_hand():
    """Four images with one reference each, and unigrams only: 10 times the cosine of tf-idf.

    `<end>` and word 4 are in all images and have weight 0, word 5 is in two: log(4/2), and 6 and
    7 are in one: log(4).
    """
    references = [[[4, 5, 6, END]], [[4, 5, 7, END]], [[4, END]], [[4, END]]]
    score = scorer(references, True, n=1)
    half, quarter = np.log(2), np.log(4)
    expected = 10 * half**2 / (half**2 + quarter**2)  # words 5 and 7 against 5 and 6
    found = rewards(score, [[4, 5, 7, END], [4, 5, 6, END]], [0, 0], references, [0])
    assert found == pytest.approx([expected, 10])


def test_end_counts():
    """A caption that breaks off scores less than the complete one only if `<end>` is counted."""
    references = [[[4, 5, 6, END]], [[7, 8, 9, END]], [[10, 11, END]]]
    complete, broken = [4, 5, 6, END], [4, 5, 6]
    a, b = rewards(scorer(references, True), [complete, broken], [0, 0], references, [0])
    assert a == pytest.approx(10) and b < 8
    a, b = rewards(scorer(references, False), [complete, broken], [0, 0], references, [0])
    assert a == b == pytest.approx(7.5)  # no 4-gram


def test_signature():
    """The signature names the settings, and differs between them."""
    references = [[[4, END]], [[5, END]]]
    one, other = (scorer(references, with_end).signature for with_end in (True, False))
    assert one != other and one.startswith("CIDEr-D|n:4|sigma:6.0|") and "," not in one


def test_vocabulary_too_large():
    """A vocabulary whose n-grams have no 64-bit key is an error."""
    with pytest.raises(ValueError, match="64 bits"):
        scorer([[[4, END]]], True, vocab_size=60_000)
