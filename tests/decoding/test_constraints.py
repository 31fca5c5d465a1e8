"""Words that may not follow: bad endings and repeated phrases."""

import random
import re

import numpy as np
import pytest
import torch
from naive import beam_search, without_special_tokens

from captioning.decoding import search as decoding
from captioning.decoding.constraints import CONNECTORS, DETERMINERS, build_constraint
from captioning.scoring.metrics import BAD_ENDINGS
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
    expected = [
        [bool(REPEATED.search(" ".join([*words, word]))) for word in VOCAB.words] for words in texts
    ]
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


class Bigrams:
    """A decoder whose logits depend on the last token, its position, and the image."""

    def __init__(self, table, position):
        self.table, self.position = table, position

    def init_state(self, memory):
        return (torch.zeros(1, len(memory), dtype=torch.int64),)

    def step(self, tokens, state, memory):
        (t,) = state
        return self.table[tokens] + self.position[t[0]] + memory, (t + 1,), None


def test_beam_search():
    """With both bans, the captions are those of a naive search over what is permitted."""
    torch.manual_seed(0)
    size = len(VOCAB)
    table, position, memory = (torch.randn(n, size) / 2 for n in (size, 8, 20))
    for before, after in (("<start>", "a"), ("a", "man"), ("man", "and"), ("and", "a")):
        table[VOCAB(before), VOCAB(after)] += 3

    def is_permitted(tokens):
        *words, last = (VOCAB.words[token] for token in tokens)
        ends_badly = last == "<end>" and words and words[-1] in BAD_ENDINGS
        return not ends_badly and not REPEATED.search(" ".join([*words, last]))

    def permitted(image):
        def language_model(tokens):
            logits = table[tokens[-1] if tokens else 1] + position[len(tokens)] + image
            log_probs = without_special_tokens(logits.numpy())
            banned = [not is_permitted([*tokens, token]) for token in range(size)]
            return np.where(banned, -np.inf, log_probs)

        return language_model

    decoder, constraint = Bigrams(table, position), build_constraint(VOCAB, True, True)
    decoded = decoding.beam_search(decoder, memory, 3, 8, constraint=constraint)
    free = decoding.beam_search(decoder, memory, 3, 8)
    clear = changed = 0
    for image, found, other in zip(memory, decoded.tokens, free.tokens, strict=True):
        (best,), margin = beam_search(permitted(image), 3, 8, 0.7)
        if margin > 1e-4:
            clear += 1
            assert [t for t in found.tolist() if t] == best.tokens
            changed += best.tokens != [t for t in other.tolist() if t]
    assert clear >= 14 and changed >= 3


def test_both():
    """Two constraints ban what either bans; none chosen is None."""
    both = {"ban_bad_endings": True, "ban_repeated_phrases": True}
    assert banned_after("a man and a", **both) == {"man", VOCAB.words[END]}
    assert build_constraint(VOCAB) is None
