"""Perplexity, scores against the references, and diagnostics."""

import math
from collections import Counter

import pytest
import torch

from captioning.base.tokens import TOKENIZER, tokenize
from captioning.scoring.cross_entropy import cross_entropy
from captioning.scoring.metrics import caption_scores, diagnostics, perplexity, unk_rate
from model import CaptionModel, ModelConfig
from vocabulary import Vocabulary

CANDIDATES = ["a dog runs on the grass", "a red bus in the street", "two cats sleep"]
REFERENCES = [
    ["A dog runs across the grass.", "the dog is on the green grass"],
    ["a red bus drives down the street", "A bus in the street!", "red bus"],
    ["two cats are sleeping on a bed", "cats"],
]


def scores_of(candidates, references):
    return caption_scores(candidates, references)[0]


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def naive_bleu(candidates, references, longest):
    """The formula of Papineni et al. (2002), with the closest reference length."""
    matches, possible, length, closest = Counter(), Counter(), 0, 0
    for candidate, texts in zip(candidates, references, strict=True):
        words, texts = tokenize(candidate), [tokenize(text) for text in texts]
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


# ---------------------------------------------------------------------------- perplexity


def test_perplexity_by_hand():
    """Words of probability 1/2, 1/4 and 1/8 have perplexity 4: the geometric mean, inverted."""
    nll = -math.log(1 / 2) - math.log(1 / 4) - math.log(1 / 8)
    assert perplexity(nll, 3) == pytest.approx(4)


def test_perplexity_of_a_uniform_model():
    """A model that predicts every word with equal probability has perplexity `vocab_size`."""
    vocab = Vocabulary.build(["a dog", "a cat"], threshold=1)
    config = ModelConfig(backbone="mobilenet_v3_small", image_size=32, embed_size=4, hidden_size=4)
    model = CaptionModel(vocab, config, weights=None).eval()
    torch.nn.init.zeros_(model.decoder.linear.weight)
    torch.nn.init.zeros_(model.decoder.linear.bias)
    captions = torch.tensor([[1, 4, 5, 6, 2], [1, 5, 2, 0, 0]])
    sums = cross_entropy(model, torch.rand(2, 4), captions)
    assert int(sums["targets"]) == 6
    assert perplexity(sums["loss"].item(), 6) == pytest.approx(len(vocab)) == pytest.approx(7)


def test_extreme_perplexities():
    """However large the loss, the perplexity is finite; without a target token it is an error."""
    assert math.isfinite(perplexity(1e9, 1))
    with pytest.raises(ValueError, match="at least one"):
        perplexity(0.0, 0)


def test_unk_rate():
    """The fraction of words that are not in the vocabulary; 0 without words."""
    assert unk_rate(["a dog runs", "a giraffe!"], {"a", "dog"}) == pytest.approx(2 / 5)
    assert unk_rate([], {"a"}) == 0


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu(n):
    """BLEU equals its definition, including clipping and the brevity penalty."""
    assert scores_of(CANDIDATES, REFERENCES)[f"BLEU-{n}"] == pytest.approx(
        naive_bleu(CANDIDATES, REFERENCES, n), rel=1e-6
    )


def test_rouge_and_cider():
    """ROUGE-L and CIDEr-D are the means over the images of their definitions."""
    candidates = [tokenize(text) for text in CANDIDATES]
    truth = [[tokenize(text) for text in texts] for texts in REFERENCES]
    rouge = [naive_rouge(*pair) for pair in zip(candidates, truth, strict=True)]
    cider = [naive_cider(words, row, truth) for row, words in enumerate(candidates)]
    scores, per_image = caption_scores(CANDIDATES, REFERENCES)
    assert per_image == pytest.approx(cider) and max(cider) > 1
    assert scores["CIDEr-D"] == pytest.approx(sum(cider) / 3)
    assert scores["ROUGE-L"] == pytest.approx(sum(rouge) / 3)
    assert scores["tokenizer"] == TOKENIZER


@pytest.mark.parametrize(
    "candidates, expected", [(["A dog runs on grass.", "two cats sleep in bed"], 1), (["", ""], 0)]
)
def test_best_and_worst_captions(candidates, expected):
    """Captions that equal their references but for case and punctuation score 1, empty ones 0."""
    scores = scores_of(candidates, [["a dog runs on GRASS"], ["two cats sleep, in bed!"]])
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(expected)
    assert (scores["CIDEr-D"] > 0) == expected


def test_scores_follow_the_image(capsys):
    """Each caption is scored against its own references, and nothing is printed."""
    right = scores_of(CANDIDATES, REFERENCES)["CIDEr-D"]
    wrong = scores_of(CANDIDATES[::-1], REFERENCES)["CIDEr-D"]
    assert right > wrong
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "candidates, references",
    [(CANDIDATES[:2], REFERENCES), ([], []), (["a dog"], [[]])],
    ids=["fewer captions", "nothing", "no reference"],
)
def test_lists_that_do_not_match(candidates, references):
    """Without one caption and at least one reference per image there is an error."""
    with pytest.raises(ValueError):
        scores_of(candidates, references)


# ---------------------------------------------------------------------------- diagnostics


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
