"""Fitting a model's `Confidence` to the captions of validation images.

model.confidence = calibrate(model, validation_images, beam_size=5)
"""

import torch

from captioning.base.modules import eval_mode
from captioning.decoding.confidence import Confidence, caption_predictors
from captioning.decoding.generate import generate
from captioning.scoring.evaluation import score_sources

BATCH_SIZE = 64


@torch.no_grad()
def calibrate(model, images, beam_size=5) -> Confidence:
    """A `Confidence` that is fitted to the CIDEr-D of the captions of validation images.

    model: a `CaptionModel` with a detector. images: a `data_loader.ImageDataset`.
    All captions of the beam are used.
    """
    ranks, predictors, found = [], [], []
    decoder = model.detector.supported(model.decoder)
    with eval_mode(model):
        for encoded in encode_images(model, images):
            with model.autocast():
                decoded = generate(decoder, encoded, beam_size=beam_size, n_best=beam_size)
            predictors.append(caption_predictors(model.detector, encoded, decoded).cpu())
            found.append(decoded.scores.cpu() > -torch.inf)
            ranks += model.decode(decoded)
    captions = [[of[min(n, len(of) - 1)] for of in ranks] for n in range(beam_size)]
    scores = torch.tensor([score_sources(of_rank, images.data)[1] for of_rank in captions]).T
    predictors, found = torch.cat(predictors), torch.cat(found)  # (M, N, 5), (M, N)
    confidence = Confidence.fit(predictors[found], scores[found])
    # The captions that are chosen are those whose score is overestimated: fit the scale to them.
    values = confidence.expected(predictors)
    best = values.masked_fill(~found, -torch.inf).argmax(1, keepdim=True)
    x, y = values.gather(1, best).squeeze(1), scores.gather(1, best).squeeze(1)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    bias = y.mean() + slope * (confidence.bias - x.mean())
    return Confidence(slope * confidence.weight, bias)


def encode_images(model, images):
    """Yields what `model.encode` returns for the batches of an `ImageDataset`."""
    for rows in torch.arange(len(images)).split(BATCH_SIZE):
        batch = images.__getitems__(rows)
        with model.autocast():
            encoded = model.encode(batch.images, batch.features)
        yield encoded
