"""Which words the captions of an image have, by logistic regression on the features of the CNN.

model.detector = WordDetector.fit(encoded, shares)      # of the training images
model.detector.probabilities(encoded)                   # (B, V)
decoder = model.detector.supported(model.decoder)       # makes these words more probable

Captioning models have used detectors of words since Fang et al. (2015, arXiv:1411.4952) and Wu et
al. (2016, arXiv:1506.01144). A detector learns from fewer images than a decoder which words a
caption has, because it does not have to learn their order. Here it helps a trained decoder.

A CNN that was trained to classify images knows objects that hardly occur in the training captions.
With its classifier, the detector also uses the probabilities of the classes that a word names.
"""

import torch
import torch.nn.functional as F
from torch import nn

from captioning.base.tokens import SPECIAL_TOKENS

COMPONENTS = 256  # of the features
LENGTH = 16.0  # to which the vector of components of an image is scaled
EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 512, 0.02  # of the regression
PENALTY = 3e-3  # of squared weights
FLOOR = 3e-3  # added to class probabilities, whose logarithm is limited by it
WEIGHT = 0.5  # of log(probability of a word in the image / share of all captions), in the logits
SMOOTHING, LIMIT = 0.01, 3.0  # added to the probability and the share; of the logarithm


class WordDetector(nn.Module):
    """The log-odds that a word is in a caption of an image, minus those for any image.

    fields: the buffers below by their names; `fit` makes them.
    """

    center: torch.Tensor  # (C,) the mean of the training images' features
    basis: torch.Tensor  # (C, D) their principal components, each feature scaled
    weight: torch.Tensor  # (D, V)
    bias: torch.Tensor  # (V,)
    shares: torch.Tensor  # (V,) of the captions of an image that have the word, the mean
    classifier: torch.Tensor  # (K, C) int8; K is 0 without a classifier
    class_scale: torch.Tensor  # (K,) of the rows of `classifier`
    class_bias: torch.Tensor  # (K,)
    named: torch.Tensor  # (2, entries) a word, and a class that it names
    class_shares: torch.Tensor  # (V,) the mean probability of the classes that a word names
    class_weight: torch.Tensor  # (V,)

    def __init__(self, fields: dict):
        super().__init__()
        for name in WordDetector.__annotations__:  # not in the state dict of the model
            self.register_buffer(name, fields[name], persistent=False)

    @classmethod
    def fit(cls, features, shares, classifier=None, named=()) -> "WordDetector":
        """Logistic regression of the shares on the features.

        features: (N, C), or (N, P, C) with positions. shares: (N, V), of the captions of an image
        that have a word. classifier: the weight (K, C) and the bias (K,) of the CNN's last layer.
        named: pairs of a word index and the index of a class that it names.
        """
        x, vocab_size = pooled(features).detach(), shares.size(1)
        scale = x.std(0) + 1e-3
        _, components = torch.linalg.eigh(((x - x.mean(0)) / scale).T.cov())  # ascending
        weight, class_bias = classifier or (x.new_zeros(0, x.size(1)), x.new_zeros(0))
        class_scale = weight.abs().amax(1) / 127
        fields = {
            "center": x.mean(0),
            "basis": components[:, -COMPONENTS:] / scale.unsqueeze(1),
            "weight": x.new_zeros(min(COMPONENTS, x.size(1)), vocab_size),
            "shares": shares.mean(0),
            "classifier": (weight / class_scale.unsqueeze(1)).round().to(torch.int8),
            "class_scale": class_scale,
            "class_bias": class_bias,
            "named": torch.tensor(named, dtype=torch.long).view(-1, 2).T,
        }
        fields |= {k: x.new_zeros(vocab_size) for k in ("bias", "class_shares", "class_weight")}
        detector = cls(fields)
        detector.class_shares = detector.class_probabilities(x).mean(0)
        detector.regress(x, shares)
        return detector

    @torch.enable_grad()
    def regress(self, x, shares):
        """Fit the weights and biases to features (N, C) and shares (N, V)."""
        components, classes, prior = self.components(x), self.class_evidence(x), self.prior()
        common = x.new_tensor(0.3)  # of all words; `class_weight` is added to it
        parameters = [self.weight, self.bias, self.class_weight, common]
        optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], LEARNING_RATE)
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(x), generator=generator) for _ in range(EPOCHS)]
        batches = [rows for order in orders for rows in order.split(BATCH_SIZE)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, len(batches))
        for rows in batches:
            logits = prior + components[rows] @ self.weight + self.bias
            logits = logits + (common + self.class_weight) * classes[rows]
            loss = F.binary_cross_entropy_with_logits(logits, shares[rows], reduction="sum")
            squares = self.weight.square().sum() + self.class_weight.square().sum()
            optimizer.zero_grad()
            (loss / len(rows) + PENALTY * squares).backward()
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.class_weight += common

    def supported(self, decoder) -> "SupportedDecoder":
        return SupportedDecoder(decoder, self)

    def gain(self, features, vocab_size):
        """(B, vocab_size) what is added to the logits of the words, float32; 0 for special tokens,
        and for words that came to the vocabulary later.
        """
        ratio = (self.probabilities(features) + SMOOTHING) / (self.shares.float() + SMOOTHING)
        gain = WEIGHT * ratio.log().clamp(-LIMIT, LIMIT)
        gain[:, : len(SPECIAL_TOKENS)] = 0.0
        return F.pad(gain, (0, vocab_size - gain.size(1)))

    def probabilities(self, features):
        """(B, V) the probability that a word is in a caption of an image, float32.

        features: (B, C), or (B, P, C) with positions.
        """
        with torch.autocast(features.device.type, enabled=False):
            return (self.evidence(pooled(features)) + self.prior()).sigmoid()

    def evidence(self, x):
        """(B, C) -> (B, V) what an image adds to the log-odds of each word."""
        found = self.components(x) @ self.weight.float() + self.bias
        return found + self.class_weight * self.class_evidence(x)

    def prior(self):
        """(V,) the log-odds for any image."""
        return torch.logit(self.shares.float().clamp(1e-4, 0.99))

    def components(self, x):
        """(B, D) principal components, as vectors of one length."""
        return LENGTH * F.normalize((x - self.center.float()) @ self.basis.float(), dim=1)

    def class_probabilities(self, x):
        """(B, V) the probability of the classes that each word names."""
        weight = self.classifier.float() * self.class_scale.float().unsqueeze(1)
        probabilities = F.linear(x, weight, self.class_bias.float()).softmax(1)
        words, classes = self.named
        found = x.new_zeros(len(x), len(self.shares))
        return found.index_add(1, words, probabilities[:, classes])

    def class_evidence(self, x):
        """(B, V) the logarithm of that probability over its mean; 0 for other words."""
        return ((self.class_probabilities(x) + FLOOR) / (self.class_shares + FLOOR)).log()

    def fields(self) -> dict:
        """The buffers by their names, for a checkpoint."""
        return {name: getattr(self, name) for name in WordDetector.__annotations__}


class SupportedDecoder:
    """A decoder for which a `WordDetector` makes words more or less probable, until they are said.

    The memory is a tuple, that of the decoder and the gain of each word (B, vocab_size). The state
    is that of the decoder and the gain that is left (1, B, vocab_size), 0 for the words that a
    caption already has.
    """

    def __init__(self, decoder, detector):
        self.decoder, self.detector = decoder, detector

    def memory(self, features):
        gain = self.detector.gain(features, self.decoder.linear.out_features)
        return self.decoder.memory(features), gain

    def init_state(self, memory):
        return *self.decoder.init_state(memory[0]), memory[1].unsqueeze(0)

    def step(self, tokens, state, memory):
        left = state[-1].scatter(2, tokens.view(1, -1, 1), 0.0)
        logits, state, attention = self.decoder.step(tokens, state[:-1], memory[0])
        return logits.float() + left[0], (*state, left), attention


def pooled(features):
    """(B, C), or (B, P, C) with positions -> (B, C), float32."""
    return (features.mean(1) if features.dim() == 3 else features).float()


def word_shares(vocab, captions):
    """(N, V) the share of the captions of each of N images that have a word."""
    shares = torch.zeros(len(captions), len(vocab))
    for row, texts in enumerate(captions):
        for text in texts:
            shares[row, list(set(vocab.encode(text)))] += 1 / len(texts)
    return shares
