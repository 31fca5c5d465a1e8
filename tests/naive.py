"""The decoder a second time, the slow and plain way: one image, one word at a time, in numpy.

The tests hold `DecoderRNN` against it. It takes the weights from there, and no code.
"""

import numpy as np

PAD, START, END, UNK = 0, 1, 2, 3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


class NaiveDecoder:
    def __init__(self, decoder):
        self.weights = {name: w.double().numpy() for name, w in decoder.state_dict().items()}
        self.inject = decoder.inject
        self.layers = decoder.lstm.num_layers

    def linear(self, name, x):
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def cell(self, x, state):
        """One step of the LSTM, a list with one (h, c) per layer, as the textbooks write it."""
        new_state = []
        for layer, (h, c) in enumerate(state):
            w_ih, w_hh, b_ih, b_hh = (
                self.weights[f"lstm.{name}_l{layer}"]
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            i, f, g, o = np.split(w_ih @ x + b_ih + w_hh @ h + b_hh, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            new_state.append((h, c))
            x = h
        return new_state

    def start(self, image):
        """The state in which `<start>` is read, for an embedded image (embed_size,)."""
        zeros = np.zeros(self.weights["lstm.weight_hh_l0"].shape[1])
        if self.inject == "pre":
            return self.cell(image, [(zeros, zeros)] * self.layers)
        if self.inject == "init":
            h, c = self.linear("image_to_state", image).reshape(2, self.layers, -1)
            return list(zip(np.tanh(h), c, strict=True))
        return [(zeros, zeros)] * self.layers

    def read(self, word, state, image):
        """Read one word: the logits of the next one (vocab_size,), and the new state."""
        x = self.weights["embedding.weight"][word]
        if self.inject == "par":
            x = np.concatenate([x, image])
        state = self.cell(x, state)
        return self.linear("linear", state[-1][0]), state

    def teach(self, image, caption):
        """The logits for caption[1:], each from the words before it alone."""
        state, rows = self.start(image), []
        for word in caption[:-1]:
            logits, state = self.read(word, state, image)
            rows.append(logits)
        return np.stack(rows)

    def speak(self, words, image):
        """Log-probabilities of the word after `words` when captioning: real words and `<end>`."""
        state = self.start(image)
        for word in [START, *words]:
            logits, state = self.read(word, state, image)
        logits[[PAD, START, UNK]] = -np.inf
        return log_softmax(logits)
