"""Words that may not follow: bad endings and repeated phrases."""

import random
import re

import pytest
import torch

from constraints import CONNECTORS, DETERMINERS, build_constraint
from metrics import BAD_ENDINGS
from vocabulary import END, SPECIAL_TOKENS, Vocabulary

WORDS = ["a", "the", "two", "man", "dog", "red", "and", "with", "of"]
VOCAB = Vocabulary([*SPECIAL_TOKENS, *WORDS])
REPEATED = re.compile(
    rf"(?:^| )((?:{'|'.join(DETERMINERS)})(?: \S+){{1,3}}) (?:{'|'.join(CONNECTORS)}) \1$"
)


def banned_after(text, **options):
    """The words that may not follow a text."""
    tokens = torch.tensor([[VOCAB(word) for word in text.split()]], dtype=torch.int64)
    (banned,) = build_constraint(VOCAB, **options)(tokens)
    return {VOCAB.words[i] for i in banned.nonzero().flatten().tolist()}


@pytest.mark.parametrize("length", range(13))
def test_repeated_phrases(length):
    """A word is banned exactly if the text with it ends in `phrase connector phrase`."""
    rng, texts = random.Random(length), []
    for _ in range(300):
        words = rng.choices(WORDS, k=length)
        if length >= 4 and rng.random() < 0.5:  # a phrase, a connector, and the phrase again ..
            n = rng.randint(2, min(5, length // 2))
            words[-n] = rng.choice(WORDS[6:])
            words[length - n + 1 :] = words[length - 2 * n : length - n - 1]  # .. but its last word
        texts.append(words)
    tokens = torch.tensor([[VOCAB(word) for word in words] for words in texts], dtype=torch.int64)
    banned = build_constraint(VOCAB, ban_repeated_phrases=True)(tokens.view(300, length))
    expected = [[bool(REPEATED.search(" ".join([*words, word]))) for word in VOCAB.words]
                for words in texts]  # fmt: skip
    assert banned.tolist() == expected
    assert banned.any() or length < 4


@pytest.mark.parametrize(
    "text, banned",
    [
        ("a man and a", {"man"}),
        ("the dog with a red dog of a red", {"dog"}),
        ("a man and the", set()),
        ("a man with a dog and a", {"dog"}),
        ("man and", set()),
    ],
)
def test_examples(text, banned):
    """Examples of phrases that would be, and would not be, repeated."""
    assert banned_after(text, ban_repeated_phrases=True) == banned


def test_bad_endings():
    """`<end>`, and nothing else, is banned after the words of one list."""
    for word in WORDS:
        expected = {VOCAB.words[END]} if word in BAD_ENDINGS else set()
        assert banned_after(f"dog {word}", ban_bad_endings=True) == expected
    assert banned_after("", ban_bad_endings=True) == set()


def test_both():
    """Two constraints ban what either bans; none chosen is None."""
    both = {"ban_bad_endings": True, "ban_repeated_phrases": True}
    assert banned_after("a man and a", **both) == {"man", VOCAB.words[END]}
    assert build_constraint(VOCAB) is None
