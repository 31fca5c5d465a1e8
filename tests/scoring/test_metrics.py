"""Perplexity, scores against the references, and diagnostics."""

import math
from collections import Counter

import pytest
import torch

from captioning.base.tokens import TOKENIZER, tokenize
from captioning.learning.losses import TeacherForcing
from captioning.scoring.metrics import (
    caption_scores,
    diagnostics,
    java_scores,
    perplexity,
    unk_rate,
)
from model import CaptionModel, ModelConfig

CANDIDATES = ["a dog runs on the grass", "a red bus in the street", "two cats sleep"]
REFERENCES = [
    ["A dog runs across the grass.", "the dog is on the green grass"],
    ["a red bus drives down the street", "A bus in the street!", "red bus"],
    ["two cats are sleeping on a bed", "cats"],
]


def scores_of(candidates, references):
    return caption_scores(candidates, references, tokenize, TOKENIZER)[0]


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
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "cat"]
    config = ModelConfig(backbone="mobilenet_v3_small", image_size=32, embed_size=4, hidden_size=4)
    model = CaptionModel(words, config, weights=None).eval()
    torch.nn.init.zeros_(model.decoder.linear.weight)
    torch.nn.init.zeros_(model.decoder.linear.bias)
    captions = torch.tensor([[1, 4, 5, 6, 2], [1, 5, 2, 0, 0]])
    nll, tokens = TeacherForcing(model)(torch.rand(2, 3, 32, 32), captions)
    assert perplexity(nll.item(), int(tokens)) == pytest.approx(7)


def test_perplexity_without_tokens():
    """A perplexity without target tokens is an error."""
    with pytest.raises(ValueError, match="at least one"):
        perplexity(0.0, 0)


def test_perplexity_does_not_overflow():
    """However large the loss, the perplexity is a finite number."""
    assert math.isfinite(perplexity(1e9, 1))


def test_unk_rate():
    """The fraction of words that are not in the vocabulary; 0 without words."""
    assert unk_rate(["a dog runs", "a giraffe!"], {"a", "dog"}, tokenize) == pytest.approx(2 / 5)
    assert unk_rate([], {"a"}, tokenize) == 0


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu(n):
    """BLEU equals its definition, including clipping and the brevity penalty."""
    assert scores_of(CANDIDATES, REFERENCES)[f"BLEU-{n}"] == pytest.approx(
        naive_bleu(CANDIDATES, REFERENCES, n), rel=1e-6
    )


def test_rouge():
    """ROUGE-L is the mean over the images of its definition."""
    expected = [
        naive_rouge(tokenize(text), [tokenize(reference) for reference in references])
        for text, references in zip(CANDIDATES, REFERENCES, strict=True)
    ]
    assert scores_of(CANDIDATES, REFERENCES)["ROUGE-L"] == pytest.approx(sum(expected) / 3)


def test_cider():
    """The CIDEr-D of each image equals its definition, and the score is their mean."""
    truth = [[tokenize(text) for text in texts] for texts in REFERENCES]
    expected = [naive_cider(tokenize(text), row, truth) for row, text in enumerate(CANDIDATES)]
    scores, per_image = caption_scores(CANDIDATES, REFERENCES, tokenize, TOKENIZER)
    assert per_image == pytest.approx(expected)
    assert scores["CIDEr-D"] == pytest.approx(sum(expected) / 3) and max(expected) > 1
    assert scores["tokenizer"] == TOKENIZER


def test_perfect_captions():
    """Captions that equal their references but for case and punctuation score 1."""
    texts = ["a dog runs on the grass", "two cats sleep in a bed"]
    scores = scores_of(texts, [[text.upper() + "."] for text in texts])
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(1)


def test_captions_without_words():
    """Empty captions score 0."""
    scores = scores_of(["", "", ""], REFERENCES)
    assert {scores[name] for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D")} == {0}


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


def test_without_java(monkeypatch):
    """Without Java, METEOR and SPICE are None, with the reason."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    scores, _ = caption_scores(CANDIDATES, REFERENCES, tokenize, TOKENIZER, java=True)
    assert scores["METEOR"] is None and scores["SPICE"] is None
    assert scores["METEOR left out"] == "there is no java command"
    assert scores["BLEU-1"] > 0


class FailingMeteor:
    def compute_score(self, truth, result):
        raise RuntimeError("no such jar")


class WorkingSpice:
    def compute_score(self, truth, result):
        return 0.5, []


def test_java_that_fails(monkeypatch):
    """A Java scorer that fails gives None and the reason; the other is still computed."""
    monkeypatch.setattr("shutil.which", lambda name: "/bin/java")
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", FailingMeteor)
    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", WorkingSpice)
    scores = java_scores({0: ["a dog"]}, {0: ["a dog"]})
    assert scores == {"METEOR": None, "METEOR left out": "RuntimeError: no such jar", "SPICE": 0.5}


# ---------------------------------------------------------------------------- diagnostics


def test_diagnostics_by_hand():
    """Distinct captions, copies of training captions, words used, and the mean length."""
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "cat", "runs"]
    captions = ["a dog", "A dog.", "a cat runs", "a dog runs"]
    assert diagnostics(captions, ["A dog!", "the cat runs"], words, tokenize) == {
        "distinct": 3 / 4,
        "copied from train": 2 / 4,
        "bad endings": 0,
        "vocabulary used": 4,
        "vocabulary size": 8,
        "mean length": 10 / 4,
    }
