"""Adding words to a trained model."""

import math

import torch

from captioning.base.tokens import UNK

LOG_ODDS = -2.0  # of all new words together against `<unk>`, at first


def with_new_words(state: dict, count: int) -> dict:
    """The state dict of a model with `count` words more, behind those of its vocabulary.

    A new word has the embedding and the output weights of `<unk>`, as which it was read and
    predicted so far. All new words together have a probability of e^LOG_ODDS times that of `<unk>`
    (14 %), so that they hardly change the captions before they are learned.
    """
    if count == 0:
        return state
    bias = state["decoder.linear.bias"]
    rows = {
        "decoder.embedding.weight": state["decoder.embedding.weight"][UNK].expand(count, -1),
        "decoder.linear.weight": state["decoder.linear.weight"][UNK].expand(count, -1),
        "decoder.linear.bias": (bias[UNK] + LOG_ODDS - math.log(count)).expand(count),
    }
    return state | {name: torch.cat([state[name], new]) for name, new in rows.items()}
