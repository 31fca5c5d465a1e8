"""How good a caption probably is: the CIDEr-D to expect, without reference captions.

model.confidence = calibrate(model, validation_images)      # of captioning.scoring.calibration
model.confidence(model.detector, encoded, decoded)      # (B, N), of N captions for each of B images

A caption is probably good if its words are probable, if the model's `WordDetector` finds them in
the image, and if it does not repeat them. `CaptionModel.generate` ranks the captions of a beam by
their confidence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from captioning.base.tokens import SPECIAL_TOKENS

RIDGE = 100.0  # in units of the predictors' variance over all captions
# Subtracted from the confidence of captions that repeat a word of at most 8 % of all captions: the
# scores hardly change, but "a bathroom with a sink and a sink" is not right.
REPEATED, PENALTY = 2.5, 0.2


@dataclass
class Confidence:
    """The expected CIDEr-D of captions, a linear function of five predictors."""

    weight: torch.Tensor  # (5,) of the predictors
    bias: torch.Tensor  # ()

    def __call__(self, detector, encoded, decoded):
        """(B, N) the expected CIDEr-D of captions, at least 0; -1 where a caption is missing.

        detector: a `WordDetector`. encoded: features (B, P, C). decoded: captions of these images.
        """
        values = self.expected(caption_predictors(detector, encoded, decoded))
        return values.clamp(min=0).masked_fill(decoded.scores == -torch.inf, -1.0)

    def expected(self, predictors):
        """(.., 5) -> (..) the expected CIDEr-D."""
        values = predictors @ self.weight.to(predictors) + self.bias.to(predictors)
        return values - PENALTY * (predictors[..., 4] > REPEATED)

    @classmethod
    def fit(cls, predictors, scores) -> "Confidence":
        """By ridge regression of scores (M,) on predictors (M, 5)."""
        x, y = predictors.double(), scores.double()
        mean, scale = x.mean(0), x.std(0) + 1e-9
        z = (x - mean) / scale
        identity = torch.eye(z.size(1), dtype=z.dtype)
        weight = torch.linalg.solve(z.T @ z + RIDGE * identity, z.T @ (y - y.mean())) / scale
        return cls(weight.float(), (y.mean() - mean @ weight).float())


def caption_predictors(detector, encoded, decoded):
    """(B, N, 5): sum and mean of a caption's log-probabilities; how probable its words are for the
    detector, as a mean and as a sum; and how far it repeats words.

    Each word counts by its inverse document frequency in the training captions.
    """
    log_probs, tokens = decoded.log_probs.float(), decoded.tokens  # (B, N, L)
    total, lengths = log_probs.sum(2), log_probs.ne(0).sum(2).clamp(min=1)
    size = max(len(detector.shares), 1 + int(tokens.max()))
    unknown = 0, size - len(detector.shares)  # words that came to the vocabulary later
    probability = F.pad(detector.probabilities(encoded), unknown).unsqueeze(1)  # (B, 1, V)
    idf = -(F.pad(detector.shares, unknown) + 1e-4).log()
    counts = log_probs.new_zeros(*total.shape, size)  # (B, N, V)
    counts.scatter_add_(2, tokens, torch.ones_like(log_probs))
    counts[:, :, : len(SPECIAL_TOKENS)] = 0.0
    present = counts.clamp(max=1)
    squared = present * idf**2
    agreement = (squared * probability).sum(2) / squared.sum(2).clamp(min=1e-6)
    supported = (present * idf * probability).sum(2)
    repeated = ((counts - present) * idf).sum(2)
    return torch.stack([total, total / lengths, agreement, supported, repeated], 2)
