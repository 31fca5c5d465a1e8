"""Words that may not follow, for `decoding`: off by default.

    constraint = build_constraint(vocab, ban_bad_endings=True, ban_repeated_phrases=True)
    model.caption("photo.jpg", beam_size=5, constraint=constraint)

A constraint is a function (N, t) tokens so far -> (N, vocab_size) bool, True for banned tokens.
"""

import torch

from captioning.base.tokens import END
from captioning.scoring.metrics import BAD_ENDINGS
from vocabulary import Vocabulary

DETERMINERS = ("a", "an", "the", "one", "two", "three", "four", "several", "some")
CONNECTORS = ("and", "with", "of", "in", "on", "by", "near", "at", "from", "to")
LONGEST_PHRASE = 4  # words


def build_constraint(vocab: Vocabulary, ban_bad_endings=False, ban_repeated_phrases=False):
    """The union of the chosen constraints, or None if none is chosen.

    ban_bad_endings: `<end>` may not directly follow one of `metrics.BAD_ENDINGS`, such as "a" or
        "with". A caption that is cut off at max_len tokens may still end in one.
    ban_repeated_phrases: a phrase of 2 to 4 words, the first of which is one of DETERMINERS, may
        not stand on both sides of one of CONNECTORS: neither "a woman and a woman" nor "a man of a
        man". The word that would complete the second phrase is banned. Permitted are other
        repetitions, as in "a woman in a hat and a woman" and "a woman and the woman".
    """
    chosen = []
    if ban_bad_endings:
        chosen.append(BadEndings(vocab))
    if ban_repeated_phrases:
        chosen.append(RepeatedPhrases(vocab))
    if not chosen:
        return None
    return lambda tokens: torch.stack([constraint(tokens) for constraint in chosen]).any(0)


class BadEndings:
    def __init__(self, vocab):
        self.size, self.words = len(vocab), _is_one_of(BAD_ENDINGS, vocab)

    def __call__(self, tokens):
        banned = torch.zeros(len(tokens), self.size, dtype=torch.bool, device=tokens.device)
        if tokens.size(1):
            banned[:, END] = self.words.to(tokens.device)[tokens[:, -1]]
        return banned


class RepeatedPhrases:
    def __init__(self, vocab):
        self.size = len(vocab)
        self.determiners = _is_one_of(DETERMINERS, vocab)
        self.connectors = _is_one_of(CONNECTORS, vocab)

    def __call__(self, tokens):
        count, t = tokens.shape
        banned = torch.zeros(count, self.size, dtype=torch.bool, device=tokens.device)
        determiners = self.determiners.to(tokens.device)
        connectors = self.connectors.to(tokens.device)
        for n in range(2, LONGEST_PHRASE + 1):  # the next word would complete .. phrase x phrase
            start = t - 2 * n
            if start < 0:
                break
            first, second = tokens[:, start : start + n], tokens[:, start + n + 1 :]  # n, n-1 words
            repeats = (first[:, :-1] == second).all(1)
            repeats &= determiners[first[:, 0]] & connectors[tokens[:, start + n]]
            rows = repeats.nonzero().squeeze(1)
            banned[rows, first[rows, -1]] = True
        return banned


def _is_one_of(words, vocab):
    """(vocab_size,) bool: whether each token is one of `words`."""
    result = torch.zeros(len(vocab), dtype=torch.bool)
    result[[vocab(word) for word in words if word in vocab.words]] = True
    return result
