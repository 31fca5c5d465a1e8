"""Evaluation of a model: teacher-forced loss, generated captions and their scores.

    python evaluate.py runs/x/best.pt val2017 --captions annotations/captions_val2017.json
    python evaluate.py runs/x/best.pt my_photos --results captions.json
    python evaluate.py runs/x/best.pt my_photos --beam-size 5 --n-best 3
    python evaluate.py runs/0/best.pt val2017 --captions C --ensemble runs/1/best.pt runs/2/best.pt

The first command prints the metrics. `--results` writes COCO's results format, exactly
`[{"image_id": .., "caption": ..}]`; without `--captions` an image's id is the number at the end of
its file name, as in COCO, or else the file name.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from captioning.base.distributed import (
    all_reduce_sum,
    gather,
    interleave,
    pick_device,
    rank_and_world_size,
    to_float64,
)
from captioning.base.files import write_text
from captioning.base.tokens import TOKENIZER, tokenize
from captioning.data.coco import CocoCaptions, DataError
from captioning.data.features import extract_features
from captioning.data.images import BadImageError
from captioning.decoding import search as decoding
from captioning.decoding.constraints import build_constraint
from captioning.decoding.ensemble import Ensemble
from captioning.learning.losses import TeacherForcing
from captioning.networks.layers import eval_mode
from captioning.scoring.metrics import caption_scores, diagnostics, perplexity, unk_rate
from data_loader import image_loader, val_loader
from model import CaptionModel

BATCH_SIZE = 32  # of the images in a folder
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def evaluate_loss(model, loader) -> tuple[float, int]:
    """(total negative log-likelihood in nats, number of targets) over all captions of a loader.

    Each rank evaluates the batches of its own loader, and all ranks get the sums.
    """
    loss = TeacherForcing(model, loader.dataset.features is not None)
    total, count = 0.0, 0
    with eval_mode(model):
        for batch in loader:
            nll, tokens = loss(*batch)
            total, count = total + to_float64(nll), count + int(tokens)
    total, count = all_reduce_sum(torch.as_tensor([total, count], dtype=torch.float64)).tolist()
    return total, int(count)


def caption_images(model, loader, beam_size=3, **options) -> list[str]:
    """A generated caption for every image of an `image_loader`, in order.

    model: a `CaptionModel`, or an `Ensemble` with a list of loaders, one for each of its models.
    `options` are those of `decoding.generate`.
    """
    several = isinstance(loader, list)
    loaders, captions = loader if several else [loader], []
    precomputed = loaders[0].dataset.features is not None
    for batches in zip(*loaders, strict=True):
        images = [images for images, _ in batches]
        captions += model.decode(
            model.generate(
                images if several else images[0], precomputed, beam_size=beam_size, **options
            )
        )
    return captions


def caption_dataset(model, data, *, transform=None, features=None, **options) -> list[str]:
    """Same as `caption_images` for all images of `data`, divided among the ranks.

    features: for an `Ensemble` a list, with the features for each of its models.
    """
    rank, world_size = rank_and_world_size()

    def loader(features):
        return image_loader(
            data, transform=transform, features=features, rank=rank, world_size=world_size
        )

    loaders = [loader(f) for f in features] if isinstance(features, list) else loader(features)
    return interleave(gather(caption_images(model, loaders, **options)))


def evaluate_captions(model, loader, training_captions=(), beam_size=3, **options) -> dict:
    """Perplexity, scores of the generated captions, and diagnostics of a split.

    loader: a `val_loader`, whose images are captioned too. All ranks get the same metrics.
    """
    return {
        "images": len(loader.dataset.data),
        "beam_size": beam_size,
        "perplexity": perplexity(*evaluate_loss(model, loader)),
        **score_captions(model, loader, training_captions, beam_size=beam_size, **options),
    }


def score_captions(model, loader, training_captions=(), **options) -> dict:
    """`evaluate_captions` without the perplexity: no teacher forcing."""
    dataset, data = loader.dataset, loader.dataset.data
    candidates = caption_dataset(
        model, data, transform=dataset.transform, features=dataset.features, **options
    )
    return score(candidates, data, model.vocab, training_captions)


def score(candidates, data, vocab, training_captions=()) -> dict:
    """The scores of generated captions, one per image of `data`, and diagnostics."""
    scores, _ = caption_scores(candidates, data.captions, tokenize, TOKENIZER)
    return {
        "unk_rate": unk_rate(data.all_captions, set(vocab.words), tokenize),
        **scores,
        **diagnostics(candidates, training_captions, vocab.words, tokenize),
    }


# ---------------------------------------------------------------------------- image files


class Captioned(NamedTuple):
    """The generated captions of an image file."""

    path: Path
    captions: list[str]  # one, or with `n_best` as many as exist, best first
    scores: list[float]  # of the captions, see `decoding.Decoded`
    attention: np.ndarray | None  # of the best caption, see `CaptionModel.caption`


def caption_files(model, paths, on_bad=None, return_attention=False, **options):
    """Caption image files; yields a `Captioned` for each, in order.

    A batch of files is read when its captions are requested, so that the memory does not depend on
    the number of files.

    model: a `CaptionModel` or an `Ensemble`. on_bad: a function that gets the BadImageError of a
    file that cannot be read, which is then left out; None: it is raised. options: of
    `decoding.generate`.

    Raises ValueError for attention of a model without.
    """
    for start in range(0, len(paths), BATCH_SIZE):
        readable, images = read_images(model, paths[start : start + BATCH_SIZE], on_bad)
        if not readable:
            continue
        decoded = model.generate(images, **options)
        if decoded.tokens.dim() == 2:  # one caption per image
            decoded = decoding.Decoded(*(None if x is None else x.unsqueeze(1) for x in decoded))
        best = decoding.Decoded(*(None if x is None else x[:, 0] for x in decoded))
        maps = model.attention_maps(best) if return_attention else [None] * len(readable)
        rows = zip(readable, model.decode(decoded), decoded.scores.tolist(), maps, strict=True)
        for path, captions, scores, attention in rows:
            count = sum(score > -math.inf for score in scores) or 1  # fewer than n_best may exist
            yield Captioned(path, captions[:count], scores[:count], attention)


def read_images(model, paths, on_bad=None):
    """(the paths of the files that can be read, their batch); `on_bad` as in `caption_files`.

    Each file is opened once. Without a readable file, the batch is None.
    """
    readable, images = [], []
    for path in paths:
        try:
            images.append(model.preprocess([path]))
            readable.append(path)
        except BadImageError as error:
            if on_bad is None:
                raise
            on_bad(error)
    return readable, model.concatenate(images) if images else None


def find_images(folder) -> list[Path]:
    """The image files in a folder and its subfolders, sorted, but no hidden ones.

    Raises DataError if there is none.
    """
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(f"there is no image in {folder}; check the path")
    return paths


def image_id_of(path) -> int | str:
    """COCO_val2014_000000000042.jpg, 000000000042.jpg -> 42; holiday.jpg -> "holiday.jpg"."""
    digits = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", path.stem)
    return int(digits[1]) if digits else path.name


def write_results(path, image_ids, captions):
    """COCO's results format. Raises OSError if the file cannot be written."""
    results = [{"image_id": i, "caption": c} for i, c in zip(image_ids, captions, strict=True)]
    write_text(path, json.dumps(results))


# ---------------------------------------------------------------------------- command line


def decoding_options(args, vocab) -> dict:
    """The options of `decoding.generate` that the command line gives."""
    names = ("beam_size", "length_penalty", "n_best", "groups", "diversity", "temperature")
    options = {name: getattr(args, name) for name in names}
    if args.beam_size is None:
        options["beam_size"] = 1 if args.temperature else 3
    constraint = build_constraint(vocab, args.ban_bad_endings, args.ban_repeated_phrases)
    return options | {"constraint": constraint}


def run(args) -> dict | None:
    """Caption the images; returns the metrics if there are reference captions."""
    device = pick_device(args.device)
    models = [
        CaptionModel.from_checkpoint(path, device, args.precision)
        for path in [args.checkpoint, *args.ensemble]
    ]
    ensemble, options = Ensemble(models), decoding_options(args, models[0].vocab)
    if not args.captions:
        caption_folder(ensemble, args, options)
        return None
    if args.n_best:
        raise ValueError("--n-best prints captions: it cannot be combined with --captions")
    data = CocoCaptions(args.images, args.captions)
    arrays = [
        extract_features(m.encoder, data.paths, m.transform, args.cache_dir).features
        for m in models
    ]
    candidates = caption_dataset(ensemble, data, features=arrays, **options)
    if args.results:
        write_results(args.results, data.image_ids, candidates)
    metrics = {"images": len(data), "models": len(models)}
    metrics |= {k: v for k, v in options.items() if k not in ("n_best", "constraint")}
    metrics |= {
        "ban_bad_endings": args.ban_bad_endings,
        "ban_repeated_phrases": args.ban_repeated_phrases,
    }
    loaders = [
        val_loader(
            data, ensemble.vocab, features=features, cache_dir=args.cache_dir, group_images=True
        )
        for features in arrays
    ]
    metrics["perplexity"] = perplexity(*ensemble.evaluate_loss(loaders))
    return metrics | score(candidates, data, models[0].vocab)


def caption_folder(ensemble, args, options):
    """Print the captions of all images in a folder, and write the best of each to `--results`.

    With `--n-best`, a line has the score of its caption, which is higher for a better one.
    """
    paths, best = find_images(args.images), []
    for path, captions, scores, _ in caption_files(ensemble, paths, **options):
        best.append(captions[0])
        for caption, score in zip(captions, scores, strict=True):
            print(f"{path}: {f'{score:.3f} ' if args.n_best else ''}{caption}")
    if args.results:
        write_results(args.results, map(image_id_of, paths), best)


def parse_args(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a captioning model.")
    parser.add_argument("checkpoint", help="best.pt of a run")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--captions", help="their reference captions, in COCO's format")
    parser.add_argument("--results", help="file for the captions, in COCO's results format")
    parser.add_argument("--ensemble", nargs="+", default=[], help="checkpoints to average with")
    parser.add_argument("--beam-size", type=int, help="default: 3, or 1 with a temperature")
    parser.add_argument("--n-best", type=int, help="print so many captions per image, with scores")
    parser.add_argument("--groups", type=int, default=1, help="of a diverse beam search")
    parser.add_argument("--diversity", type=float, default=0.5, help="penalty between the groups")
    parser.add_argument("--length-penalty", type=float, default=decoding.LENGTH_PENALTY)
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: sample words")
    parser.add_argument("--ban-bad-endings", action="store_true", help='such as "a man with a"')
    parser.add_argument(
        "--ban-repeated-phrases", action="store_true", help='such as "a man and a man"'
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", help="auto, float32 or bfloat16; default: the checkpoint's")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    try:
        metrics = run(parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if metrics:
        print(json.dumps(metrics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
