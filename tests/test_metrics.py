"""Perplexity, agreement with references, and diagnostics."""

import math
from collections import Counter

import pytest
import torch
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from engine import caption_nll
from metrics import caption_scores, diagnostics, java_scores, perplexity, unk_rate
from model import CaptionModel
from vocabulary import TOKENIZER, tokenize

CANDIDATES = ["a dog runs on the grass", "a red bus in the street", "two cats sleep"]
REFERENCES = [
    ["A dog runs across the grass.", "the dog is on the green grass"],
    ["a red bus drives down the street", "A bus in the street!", "red bus"],
    ["two cats are sleeping on a bed", "cats"],
]


def scores_of(candidates, references):
    return caption_scores(candidates, references, tokenize, TOKENIZER)[0]


def naive_bleu(candidates, references, longest):
    """Papineni et al. (2002) by the letter: corpus counts, clipped, closest reference length."""
    matches, possible, said, wanted = Counter(), Counter(), 0, 0
    for candidate, texts in zip(candidates, references, strict=True):
        words, texts = tokenize(candidate), [tokenize(text) for text in texts]
        said += len(words)
        wanted += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for n in range(1, longest + 1):
            grams, *others = (
                Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
                for text in [words, *texts]
            )
            possible[n] += sum(grams.values())
            matches[n] += sum(min(k, max(o[gram] for o in others)) for gram, k in grams.items())
    precision = math.prod(matches[n] / possible[n] for n in range(1, longest + 1)) ** (1 / longest)
    return precision * min(1, math.exp(1 - wanted / said))


# ---------------------------------------------------------------------------- perplexity


def test_perplexity_by_hand():
    """Words of probability 1/2, 1/4 and 1/8 have perplexity 4: the geometric mean, inverted."""
    nll = -math.log(1 / 2) - math.log(1 / 4) - math.log(1 / 8)
    assert perplexity(nll, 3) == pytest.approx(4)


def test_perplexity_of_a_guess():
    """A model that finds every word equally likely has the vocabulary's size as perplexity."""
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "cat"]
    model = CaptionModel(words, "mobilenet_v3_small", None, embed_size=4, hidden_size=4).eval()
    torch.nn.init.zeros_(model.decoder.linear.weight)
    torch.nn.init.zeros_(model.decoder.linear.bias)
    features = torch.rand(2, model.encoder.feature_size)
    nll, tokens = caption_nll(model, features, torch.tensor([[1, 4, 5, 6, 2], [1, 5, 2, 0, 0]]))
    assert perplexity(nll.item(), tokens) == pytest.approx(7)


def test_perplexity_of_nothing():
    """Perplexity over no word at all is an error."""
    with pytest.raises(ValueError, match="at least one"):
        perplexity(0.0, 0)


def test_perplexity_of_a_disaster():
    """However bad a model is, its perplexity is a number and not an overflow."""
    assert math.isfinite(perplexity(1e9, 1))


def test_unk_rate():
    """The share of words that the vocabulary lacks."""
    assert unk_rate(["a dog runs", "a giraffe!"], {"a", "dog"}, tokenize) == pytest.approx(2 / 5)
    assert unk_rate([], {"a"}, tokenize) == 0


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu(n):
    """BLEU agrees with its definition, counted by hand, brevity penalty included."""
    assert scores_of(CANDIDATES, REFERENCES)[f"BLEU-{n}"] == pytest.approx(
        naive_bleu(CANDIDATES, REFERENCES, n), rel=1e-6
    )


def test_rouge_and_cider():
    """ROUGE-L and CIDEr-D are those of COCO's own code, given the same words."""
    result = {row: [" ".join(tokenize(text))] for row, text in enumerate(CANDIDATES)}
    truth = {r: [" ".join(tokenize(t)) for t in texts] for r, texts in enumerate(REFERENCES)}
    scores, per_image = caption_scores(CANDIDATES, REFERENCES, tokenize, TOKENIZER)
    cider, each = Cider().compute_score(truth, result)
    assert scores["ROUGE-L"] == pytest.approx(Rouge().compute_score(truth, result)[0])
    assert scores["CIDEr-D"] == pytest.approx(cider)
    assert per_image == pytest.approx(list(each))
    assert scores["tokenizer"] == TOKENIZER


def test_cider_by_its_formula():
    """CIDEr-D is the formula of Vedantam et al. (2015), written out naively."""
    said = [tokenize(text) for text in CANDIDATES]
    truth = [[tokenize(text) for text in texts] for texts in REFERENCES]
    _, found = caption_scores(CANDIDATES, REFERENCES, tokenize, TOKENIZER)
    assert found == pytest.approx([naive_cider(s, row, truth) for row, s in enumerate(said)])
    assert max(found) > 1


def naive_cider(words, row, truth):
    """10 times the mean over n = 1..4 and the image's references of the clipped tf-idf cosine."""

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def tf_idf(words, n):
        images = {g: sum(any(grams(r, n)[g] for r in refs) for refs in truth) for g in
                  grams(words, n)}  # fmt: skip
        return {
            g: count * math.log(len(truth) / max(1, images[g]))
            for g, count in grams(words, n).items()
        }

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


def test_rouge_by_hand():
    """ROUGE-L of one word right of two, with a reference of four: F with beta 1.2."""
    precision, recall = 1 / 2, 1 / 4
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert scores_of(["dog cat"], [["the dog runs away"]])["ROUGE-L"] == pytest.approx(expected)


def test_perfect_captions():
    """Captions that are their references score 1 in BLEU and ROUGE-L."""
    texts = ["a dog runs on the grass", "two cats sleep in a bed"]
    scores = scores_of(texts, [[text.upper() + "."] for text in texts])
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(1)


def test_captions_without_words():
    """A model that says nothing scores nothing, and does not crash."""
    scores = scores_of(["", "", ""], REFERENCES)
    assert {scores[name] for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D")} == {0}


def test_scores_follow_the_image(capsys):
    """Each caption is scored against its own references; scoring prints nothing."""
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
    """One caption per image and a reference for each, or an error."""
    with pytest.raises(ValueError):
        scores_of(candidates, references)


def test_without_java(monkeypatch):
    """Where there is no Java, METEOR and SPICE are None, with the reason beside them."""
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
    """Where a Java scorer fails, it is None, with the reason, and the other still counts."""
    monkeypatch.setattr("shutil.which", lambda name: "/bin/java")
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", FailingMeteor)
    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", WorkingSpice)
    scores = java_scores({0: ["a dog"]}, {0: ["a dog"]})
    assert scores == {
        "METEOR": None, "METEOR left out": "RuntimeError: no such jar", "SPICE": 0.5
    }  # fmt: skip


# ---------------------------------------------------------------------------- diagnostics


def test_diagnostics_by_hand():
    """Distinct captions, copies of training captions, words in use, and the mean length."""
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "cat", "runs"]
    spoken = ["a dog", "A dog.", "a cat runs", "a dog runs"]
    assert diagnostics(spoken, ["A dog!", "the cat runs"], words, tokenize) == {
        "distinct": 3 / 4,
        "seen in training": 2 / 4,
        "vocabulary used": 4,
        "vocabulary size": 8,
        "mean length": 10 / 4,
    }
