"""Retrieval: whether a model finds the image of a caption, and the caption of an image.

A metric of what the model knows about images that needs neither generated captions nor n-grams
(recall at K; Hodosh et al., 2013, https://doi.org/10.1613/jair.3994).
"""

import math

import torch

from captioning.base.modules import eval_mode
from captioning.decoding.likelihood import log_probabilities
from captioning.scoring.calibration import encode_images

AT = (1, 5, 10)


def recall(scores):
    """{"image-to-text recall@1": ..}, from scores (N, N) of N images and the caption of each.

    scores: log p(caption | image), rows are images. The captions of an image are ranked by
    log p(caption | image) - log p(caption), with the mean probability over all images as
    p(caption); otherwise short captions of frequent words would be first for every image. Among
    equal scores, the right one comes last.
    """
    prior = scores.logsumexp(0) - math.log(len(scores))
    tables = {"text-to-image": scores.T, "image-to-text": scores - prior}
    results = {}
    for direction, table in tables.items():
        right = table.diagonal().unsqueeze(1)
        rank = (table >= right).sum(1)  # 1: the right one is first
        results |= {f"{direction} recall@{k}": (rank <= k).float().mean().item() for k in AT}
    return results


def retrieval(model, images) -> dict:
    """The recalls for the images of an `ImageDataset`, with the first caption of each."""
    captions = [model.vocab.encode(texts[0]) for texts in images.data.captions]
    with eval_mode(model):
        rows = []
        for encoded in encode_images(model, images):
            with model.autocast():
                rows.append(log_probabilities(model.decoder, encoded, captions))
    return {"retrieval images": len(captions), **recall(torch.cat(rows))}
