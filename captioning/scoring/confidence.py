"""How good a caption probably is: the CIDEr-D to expect, without reference captions.

model.confidence = calibrate(model, training_images, validation_images, beam_size=5)
model.confidence(encoded, decoded)              # (B,), one per image

The predictors are the log-probabilities of the caption's words, and how similar the image is to
those of the training: captions of images that look like no training image are mostly wrong.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from captioning.base.modules import eval_mode
from captioning.decoding.generate import generate
from captioning.scoring.evaluation import score_sources

BATCH_SIZE = 64
COMPONENTS = 64  # of the features, in which images are compared
NEAREST = 5  # training images, whose similarities are averaged
RIDGE = 100.0  # in units of the predictors' variance over all images


@dataclass
class Confidence:
    """The expected CIDEr-D of captions; a linear function of four predictors.

    All fields are float32 tensors on the CPU, and in a checkpoint.
    """

    center: torch.Tensor  # (C,) the mean of the training images' features
    basis: torch.Tensor  # (C, D) the principal components of the features, each feature scaled
    images: torch.Tensor  # (N, D) the training images, as unit vectors
    weight: torch.Tensor  # (4,) of the predictors
    bias: torch.Tensor  # ()

    @classmethod
    def of_images(cls, encoded) -> "Confidence":
        """Not fitted yet. encoded: what the model's `encode` returns for the training images."""
        features = pooled(encoded)  # (N, C)
        center, scale = features.mean(0), features.std(0) + 1e-3
        scaled = (features - center) / scale
        _, components = torch.linalg.eigh(scaled.T @ scaled)  # ascending
        basis = components[:, -COMPONENTS:] / scale.unsqueeze(1)
        images = F.normalize((features - center) @ basis, dim=1)
        return cls(center, basis, images, torch.zeros(4), torch.zeros(()))

    def fitted(self, predictors, scores) -> "Confidence":
        """With the weights of a ridge regression of scores (N,) on predictors (N, 4)."""
        x, y = predictors.double(), torch.as_tensor(scores, dtype=torch.float64)
        mean, scale = x.mean(0), x.std(0) + 1e-9
        z = (x - mean) / scale
        identity = torch.eye(z.size(1), dtype=z.dtype)
        weight = torch.linalg.solve(z.T @ z + RIDGE * identity, z.T @ (y - y.mean())) / scale
        bias = y.mean() - mean @ weight
        return Confidence(self.center, self.basis, self.images, weight.float(), bias.float())

    def predictors(self, encoded, decoded):
        """(B, 4): sum, mean and minimum of the first caption's log-probabilities; similarity."""
        log_probs = decoded.log_probs[:, 0].float().cpu()  # (B, L), 0 for <pad>
        total, lengths = log_probs.sum(1), log_probs.ne(0).sum(1).clamp(min=1)
        components = (pooled(encoded) - self.center) @ self.basis
        similarity = F.normalize(components, dim=1) @ self.images.T  # (B, N)
        nearest = similarity.topk(min(NEAREST, len(self.images))).values
        return torch.stack([total, total / lengths, log_probs.amin(1), nearest.mean(1)], 1)

    def __call__(self, encoded, decoded):
        """(B,) the expected CIDEr-D of the first caption of each image, at least 0."""
        return (self.predictors(encoded, decoded) @ self.weight + self.bias).clamp(min=0)

    def state(self) -> dict:
        """The fields, in half precision where they are large, for a checkpoint."""
        return {k: v.half() if v.dim() > 1 else v for k, v in asdict(self).items()}

    @classmethod
    def from_state(cls, state) -> "Confidence":
        return cls(**{name: tensor.float() for name, tensor in state.items()})


@torch.no_grad()
def calibrate(model, training_images, validation_images, **options) -> Confidence:
    """A `Confidence` whose weights are fitted to the CIDEr-D of the validation images' captions.

    model: a `CaptionModel`. training_images, validation_images: `data_loader.ImageDataset`s.
    options: those of `DecodingOptions`, with which the captions are generated.
    """

    def encoded(images):
        loader = DataLoader(images, BATCH_SIZE, collate_fn=lambda batch: batch)
        for batch in loader:
            yield model.encode(batch.images, batch.features)

    captions, predictors = [], []
    with eval_mode(model), model.autocast():
        confidence = Confidence.of_images(torch.cat([*map(pooled, encoded(training_images))]))
        for batch in encoded(validation_images):
            decoded = generate(model.decoder, batch, **options)
            predictors.append(confidence.predictors(batch, decoded))
            captions += [best for best, *_ in model.decode(decoded)]
    _, scores = score_sources(captions, validation_images.data)
    return confidence.fitted(torch.cat(predictors), scores)


def pooled(encoded):
    """(B, C), or (B, P, C) with positions -> (B, C), float32 on the CPU."""
    return (encoded.mean(1) if encoded.dim() == 3 else encoded).float().cpu()
