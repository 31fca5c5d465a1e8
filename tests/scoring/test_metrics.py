"""Perplexity, scores against the references, and diagnostics."""

import math
from collections import Counter

import pytest

from captioning.base.tokens import TOKENIZER, tokenize
from captioning.scoring.metrics import caption_scores, diagnostics, perplexity, unk_rate

CANDIDATES = ["a dog runs on the grass", "a red bus in the street", "two cats sleep"]
REFERENCES = [
    ["A dog runs across the grass.", "the dog is on the green grass"],
    ["a red bus drives down the street", "A bus in the street!", "red bus"],
    ["two cats are sleeping on a bed", "cats"],
]


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def naive_bleu(candidates, references, longest):
    """The formula of Papineni et al. (2002), with the closest reference length."""
    matches, possible, length, closest = Counter(), Counter(), 0, 0
    for words, texts in zip(candidates, references, strict=True):
        length += len(words)
        closest += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for n in range(1, longest + 1):
            grams, others = ngrams(words, n), [ngrams(text, n) for text in texts]
            possible[n] += sum(grams.values())
            matches[n] += sum(min(k, max(o[gram] for o in others)) for gram, k in grams.items())
    precision = math.prod(matches[n] / possible[n] for n in range(1, longest + 1)) ** (1 / longest)
    return precision * min(1, math.exp(1 - closest / length))


def naive_rouge(words, references):
    """The mean of ROUGE-L (Lin, 2004) with beta 1.2: best precision and best recall."""
    common = [longest_common_subsequence(words, reference) for reference in references]
    precision = max(common) / len(words)
    recall = max(c / len(reference) for c, reference in zip(common, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def longest_common_subsequence(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common_subsequence(a[:-1], b[:-1])
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


def naive_cider(words, row, truth):
    """The formula of Vedantam et al. (2015): 10 times the mean clipped tf-idf cosine."""

    def tf_idf(words, n):
        return {
            gram: count * math.log(len(truth) / max(1, images_with(gram, n)))
            for gram, count in ngrams(words, n).items()
        }

    def images_with(gram, n):
        return sum(any(ngrams(text, n)[gram] for text in texts) for texts in truth)

    total = 0
    for reference in truth[row]:
        for n in range(1, 5):
            one, other = tf_idf(words, n), tf_idf(reference, n)
            product = sum(min(one[g], other.get(g, 0)) * other.get(g, 0) for g in one)
            norms = [math.sqrt(sum(x * x for x in vector.values())) for vector in (one, other)]
            if all(norms):
                gap = len(words) - len(reference)
                total += product / math.prod(norms) * math.exp(-(gap**2) / 72)
    return 10 * total / 4 / len(truth[row])


def test_perplexity():
    """Words of probability 1/2, 1/4 and 1/8 have perplexity 4: the geometric mean, inverted; it is
    finite however large the loss, and without a target token it is an error."""
    nll = -math.log(1 / 2) - math.log(1 / 4) - math.log(1 / 8)
    assert perplexity(nll, 3) == pytest.approx(4)
    assert math.isfinite(perplexity(1e9, 1))
    with pytest.raises(ValueError, match="at least one"):
        perplexity(0.0, 0)


def test_unk_rate():
    """The fraction of words that are not in the vocabulary; 0 without words."""
    assert unk_rate(["a dog runs", "a giraffe!"], {"a", "dog"}) == pytest.approx(2 / 5)
    assert unk_rate([], {"a"}) == 0


def test_scores(capsys):
    """BLEU equals its definition, including clipping and the brevity penalty; ROUGE-L and CIDEr-D
    are the means over the images of theirs; nothing is printed."""
    candidates = [tokenize(text) for text in CANDIDATES]
    truth = [[tokenize(text) for text in texts] for texts in REFERENCES]
    bleu = {f"BLEU-{n}": naive_bleu(candidates, truth, n) for n in (1, 2, 3, 4)}
    rouge = [naive_rouge(*pair) for pair in zip(candidates, truth, strict=True)]
    cider = [naive_cider(words, row, truth) for row, words in enumerate(candidates)]
    scores, per_image = caption_scores(CANDIDATES, REFERENCES)
    assert scores.pop("tokenizer") == TOKENIZER and scores.pop("notes")
    assert scores == pytest.approx({**bleu, "ROUGE-L": sum(rouge) / 3, "CIDEr-D": sum(cider) / 3})
    assert per_image == pytest.approx(cider) and max(cider) > 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "candidates, expected", [(["A dog runs on grass.", "two cats sleep in bed"], 1), (["", ""], 0)]
)
def test_best_and_worst_captions(candidates, expected):
    """Captions that equal their references but for case and punctuation score 1, empty ones 0."""
    references = [["a dog runs on GRASS"], ["two cats sleep, in bed!"]]
    scores, _ = caption_scores(candidates, references)
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(expected)
    assert (scores["CIDEr-D"] > 0) == expected


@pytest.mark.parametrize(
    "candidates, references, expected",
    [
        (["a dog"], [["a dog", "the dog"]], "one image is 0 by construction"),
        (CANDIDATES, REFERENCES, "CIDEr-D of 3 images, fewer than 100, is too high"),
        (["", "...", "a dog"], REFERENCES, "2 of 3 captions are empty"),
        (["a dog", "a cat"], [["a dog"], ["a cat"]], "one reference per image"),
    ],
)
def test_notes(candidates, references, expected):
    """Numbers that mean less than they seem to come with a sentence that says why."""
    scores, _ = caption_scores(candidates, references)
    assert any(expected in note for note in scores["notes"])
    assert (scores["CIDEr-D"] is None) == (len(candidates) == 1)


def test_no_notes():
    """A hundred images with several references and captions with words need no sentence."""
    scores, _ = caption_scores(["a dog"] * 100, [["a dog", "a cat"]] * 100)
    assert "notes" not in scores


def test_references_without_words():
    """References without a word do not count, and an image without others is named."""
    with_emoji, _ = caption_scores(CANDIDATES, [[*texts, "\U0001f436!"] for texts in REFERENCES])
    assert with_emoji == caption_scores(CANDIDATES, REFERENCES)[0]
    with pytest.raises(ValueError, match=r"image 1 have no words: \['\.\.\.'\]"):
        caption_scores(["a dog", "a cat"], [["a dog"], ["..."]])


@pytest.mark.parametrize(
    "candidates, references",
    [(CANDIDATES[:2], REFERENCES), ([], []), (["a dog"], [[]])],
    ids=["fewer captions", "nothing", "no reference"],
)
def test_lists_that_do_not_match(candidates, references):
    """Without one caption and at least one reference per image there is an error."""
    with pytest.raises(ValueError):
        caption_scores(candidates, references)


def test_diagnostics_by_hand():
    """Distinct captions, copies of training captions, words used, and the mean length."""
    captions = ["a dog", "A dog.", "a cat runs", "a dog runs with a"]
    expected = {
        "distinct": 3 / 4,
        "copied from train": 2 / 4,
        "bad endings": 1 / 4,
        "vocabulary used": 5,
        "vocabulary size": 8,
        "mean length": 12 / 4,
    }
    assert diagnostics(captions, ["A dog!", "the cat runs"], 8) == expected
    del expected["copied from train"]  # unknown without training captions
    assert diagnostics(captions, [], 8) == expected
