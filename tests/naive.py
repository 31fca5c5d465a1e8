"""A second, independent implementation of the decoder and of the beam search, in numpy.

One image and one token at a time, in float64, without batches and without early stopping. It uses
the weights of the decoder, but none of its code.
"""

import functools
from typing import NamedTuple

import numpy as np

PAD, START, END, UNK = 0, 1, 2, 3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def without_special_tokens(logits):
    """Log-probabilities of the tokens that may be generated: words and `<end>`."""
    logits = np.array(logits, dtype=np.float64)
    logits[[PAD, START, UNK]] = -np.inf
    return log_softmax(logits)


class NaiveDecoder:
    def __init__(self, decoder):
        self.weights = {name: w.double().numpy() for name, w in decoder.state_dict().items()}
        self.inject = decoder.inject
        self.layers = decoder.lstm.num_layers

    def linear(self, name, x):
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def lstm(self, name, x, state, layer=0):
        """One step of one layer of an LSTM: its new (h, c)."""
        h, c = state
        w_ih, w_hh, b_ih, b_hh = (
            self.weights[f"{name}.{part}_l{layer}"]
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        i, f, g, o = np.split(w_ih @ x + b_ih + w_hh @ h + b_hh, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    def cell(self, x, state):
        """One step of the LSTM; the state is a list with one (h, c) per layer."""
        new_state = []
        for layer, old in enumerate(state):
            new_state.append(self.lstm("lstm", x, old, layer))
            x = new_state[-1][0]
        return new_state

    def init_state(self, image):
        """The state in which `<start>` is read, for an embedded image (embed_size,)."""
        zeros = np.zeros(self.weights["lstm.weight_hh_l0"].shape[1])
        if self.inject == "pre":
            return self.cell(image, [(zeros, zeros)] * self.layers)
        if self.inject == "init":
            h, c = self.linear("image_to_state", image).reshape(2, self.layers, -1)
            return list(zip(np.tanh(h), c, strict=True))
        return [(zeros, zeros)] * self.layers

    def step(self, token, state, image):
        """Read one token: the logits of the next one (vocab_size,), and the new state."""
        x = self.weights["embedding.weight"][token]
        if self.inject == "par":
            x = np.concatenate([x, image])
        state = self.cell(x, state)
        return self.linear("linear", state[-1][0]), state

    def teacher_forcing(self, image, caption):
        """The logits of each token of caption[1:], given the image and the tokens before it."""
        state, rows = self.init_state(image), []
        for token in caption[:-1]:
            logits, state, *_ = self.step(token, state, image)
            rows.append(logits)
        return np.stack(rows)

    def language_model(self, image):
        """A function: a list of tokens -> log-probabilities of the token that follows them."""

        @functools.cache
        def read(tokens):
            if not tokens:
                return self.step(START, self.init_state(image), image)
            return self.step(tokens[-1], read(tokens[:-1])[1], image)

        return lambda tokens: without_special_tokens(read(tuple(tokens))[0])


class NaiveAttentionDecoder(NaiveDecoder):
    """`AttentionDecoder`: one word, one head and one position at a time."""

    def __init__(self, decoder):
        self.weights = {name: w.double().numpy() for name, w in decoder.state_dict().items()}
        self.heads = decoder.num_heads

    def init_state(self, image):
        sizes = [
            self.weights[f"{n}.weight_hh_l0"].shape[1] for n in ("attention_lstm", "language_lstm")
        ]
        return [(np.zeros(size), np.zeros(size)) for size in sizes]

    def step(self, token, state, image):
        """The logits of the next token, the new state, and the attention (P,), for (P, C)."""
        keys, values = (
            np.stack([self.linear(name, np.float64(x)) for x in image])
            for name in ("keys", "values")
        )
        first, second = state
        embeddings = self.weights["embedding.weight"]
        word = embeddings[token] * np.sqrt(embeddings.shape[1])
        first = self.lstm("attention_lstm", np.concatenate([word, values.mean(0)]), first)
        query = self.linear("query", first[0])
        attended, attention, size = [], np.zeros(len(keys)), len(query) // self.heads
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.array([key[part] @ query[part] for key in keys]) / np.sqrt(size)
            weights = np.exp(log_softmax(scores))
            attended.append(weights @ values[:, part])
            attention += weights / self.heads
        inputs = np.concatenate([first[0], *attended])
        second = self.lstm("language_lstm", inputs, second)
        hidden = self.linear("projection", second[0] + self.linear("shortcut", inputs))
        return embeddings @ hidden + self.weights["linear.bias"], [first, second], attention


def at_least(language_model, min_len):
    """The language model in which no caption ends before it has `min_len` words."""

    def constrained(tokens):
        log_probs = language_model(tokens).copy()
        if len(tokens) < min_len:
            log_probs[END] = -np.inf
            log_probs = log_softmax(log_probs)
        return log_probs

    return constrained


class Hypothesis(NamedTuple):
    tokens: list
    log_probs: list  # of each token

    @property
    def ended(self):
        return self.tokens[-1] == END

    def score(self, length_penalty):
        return sum(self.log_probs) / len(self.tokens) ** length_penalty


def greedy(language_model, max_len):
    """(the hypothesis, smallest margin between the most probable token and the second)."""
    tokens, log_probs, margin = [], [], np.inf
    while len(tokens) < max_len and END not in tokens:
        distribution = language_model(tokens)
        second, first = np.sort(distribution)[-2:]
        tokens.append(int(distribution.argmax()))
        log_probs.append(first)
        margin = min(margin, first - second)
    return Hypothesis(tokens, log_probs), margin


def beam_search(language_model, beam_size, max_len, length_penalty, n_best=1):
    """(at most n_best hypotheses, best first; smallest margin between scores that were compared).

    If the margin is as small as the rounding errors of float32, other results are equally correct.
    """
    beam, ended, margins = [Hypothesis([], [])], [], [np.inf]
    for _ in range(max_len):
        longer = [
            Hypothesis([*tokens, token], [*log_probs, log_prob])
            for tokens, log_probs in beam
            for token, log_prob in enumerate(language_model(tokens))
            if log_prob > -np.inf
        ]
        longer.sort(key=lambda h: sum(h.log_probs), reverse=True)
        if len(longer) > beam_size:
            kept, dropped = longer[beam_size - 1 : beam_size + 1]
            margins.append(sum(kept.log_probs) - sum(dropped.log_probs))
        ended += [h for h in longer[:beam_size] if h.ended]
        beam = [h for h in longer[:beam_size] if not h.ended]
    ranking = sorted(ended, key=lambda h: h.score(length_penalty), reverse=True) + beam
    scores = [h.score(length_penalty) for h in ranking[: n_best + 1]]
    return ranking[:n_best], min([*margins, *np.abs(np.diff(scores))])
