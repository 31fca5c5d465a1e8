"""Evaluation of a split: teacher-forced loss, generated captions and their scores.

model: a `CaptionModel` or an `Ensemble` in all of them. With torchrun, each rank evaluates its
share of the split, and all ranks get the results.
"""

from dataclasses import asdict
from statistics import mean

import torch

from captioning.base.device import usual_defaults
from captioning.base.distributed import all_reduce_sum, gather, interleave, rank_and_world_size
from captioning.base.modules import eval_mode
from captioning.decoding.generate import DecodingOptions
from captioning.scoring.cross_entropy import batch_cross_entropy
from captioning.scoring.metrics import caption_scores, diagnostics, perplexity, unk_rate

TEXTS = {"tokenizer", "notes"}  # entries of the scores that are no numbers


@usual_defaults()
def evaluate_loss(model, loader) -> tuple[float, int]:
    """(total negative log-likelihood in nats, number of targets) over all captions of a loader.

    loader: of `get_loader` in mode "val"; with torchrun, that of this rank.
    """
    total = torch.zeros(2, dtype=torch.float64)  # of the loss and of the number of targets
    with eval_mode(model):
        for batch in loader:
            sums = batch_cross_entropy(model, batch)
            total += torch.stack([sums["loss"], sums["targets"]]).cpu()
    loss, targets = all_reduce_sum(total).tolist()
    return loss, int(targets)


@usual_defaults()
def caption_split(model, images, batch_size=64, **options) -> list[str]:
    """A generated caption for every image, in order.

    images: a `data_loader.ImageDataset`. options: those of `DecodingOptions`.
    """
    rank, world_size = rank_and_world_size()
    rows = range(rank, len(images), world_size)
    captions = []
    for i in range(0, len(rows), batch_size):
        batch = images.__getitems__(rows[i : i + batch_size])
        decoded = model.generate(batch.images, batch.features, **options)
        captions += [best for best, *_ in model.decode(decoded)]
    return interleave(gather(captions))


def score(candidates, data, vocab, training_captions=()) -> dict:
    """The scores of generated captions, one per image of `data`, and diagnostics.

    If the images are of several sources, "sources" has the scores of each, with document
    frequencies of its own for CIDEr-D, and the other scores are the means over the sources.
    """
    apart, _ = score_sources(candidates, data)
    scores = next(iter(apart.values()))
    if len(apart) > 1:
        table = {name: [of[name] for of in apart.values()] for name in scores.keys() - TEXTS}
        means = {name: None if None in column else mean(column) for name, column in table.items()}
        scores = {name: means.get(name, x) for name, x in scores.items() if name != "notes"}
        scores["sources"] = apart
    return {
        "unk_rate": unk_rate(data.all_captions, set(vocab.words)),
        **scores,
        **diagnostics(candidates, training_captions, len(vocab)),
    }


def check_cider(data):
    """Raise ValueError if the images of a source are too few for CIDEr-D to be defined."""
    for source in sorted(set(data.sources)):
        if data.sources.count(source) == 1:
            of = f" of {source}" if source else ""
            raise ValueError(
                f"{data.captions_file} has a single image{of}, for which CIDEr-D is always 0: add "
                "images, or choose --best-by loss"
            )


def score_sources(candidates, data):
    """({source: scores}, the CIDEr-D of each image) of captions, one per image of `data`."""
    apart, per_image = {}, [0.0] * len(candidates)
    for source in sorted(set(data.sources)):
        rows = [row for row, name in enumerate(data.sources) if name == source]
        own = [candidates[row] for row in rows], [data.captions[row] for row in rows]
        apart[source], values = caption_scores(*own)
        for row, value in zip(rows, values, strict=True):
            per_image[row] = value
    return apart, per_image


def evaluate_split(model, loader, images, training_captions=(), **options):
    """(perplexity, scores of the generated captions and diagnostics; the captions) of a split.

    loader: of its captions, as in `evaluate_loss`. images: an `ImageDataset` of the same split.
    options: those of `DecodingOptions`.
    """
    captions = caption_split(model, images, **options)
    metrics = {
        "images": len(images),
        "perplexity": perplexity(*evaluate_loss(model, loader)),
        **asdict(DecodingOptions(**options)),
        **score(captions, images.data, model.vocab, training_captions),
    }
    return metrics, captions
