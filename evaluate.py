"""Evaluation of a model: teacher-forced loss, generated captions and their scores.

    python evaluate.py runs/x/best.pt val2017 --captions annotations/captions_val2017.json
    python evaluate.py runs/x/best.pt my_photos --results captions.json

The first command prints the metrics. `--results` writes COCO's results format, exactly
`[{"image_id": .., "caption": ..}]`; without `--captions` an image's id is the number at the end of
its file name, as in COCO, or else the file name.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from coco import CocoCaptions, DataError
from data_loader import image_loader, val_loader
from distributed import (
    all_reduce_sum,
    gather,
    interleave,
    pick_device,
    rank_and_world_size,
    to_float64,
)
from features import extract_features
from files import write_text
from layers import eval_mode
from losses import TeacherForcing
from metrics import caption_scores, diagnostics, perplexity, unk_rate
from model import CaptionModel
from vocabulary import TOKENIZER, tokenize

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

    `options` are those of `decoding.generate`.
    """
    precomputed, captions = loader.dataset.features is not None, []
    for images, _ in loader:
        captions += model.decode(
            model.generate(images, precomputed, beam_size=beam_size, **options)
        )
    return captions


def caption_dataset(model, data, *, transform=None, features=None, **options) -> list[str]:
    """Same as `caption_images` for all images of `data`, divided among the ranks."""
    rank, world_size = rank_and_world_size()
    loader = image_loader(data, transform=transform, features=features, rank=rank,
                          world_size=world_size)  # fmt: skip
    return interleave(gather(caption_images(model, loader, **options)))


def evaluate_captions(model, loader, training_captions=(), beam_size=3, **options) -> dict:
    """Perplexity, scores of the generated captions, and diagnostics of a split.

    loader: a `val_loader`, whose images are captioned too. All ranks get the same metrics.
    """
    dataset, data = loader.dataset, loader.dataset.data
    candidates = caption_dataset(
        model, data, transform=dataset.transform, features=dataset.features, beam_size=beam_size,
        **options,
    )  # fmt: skip
    nll, tokens = evaluate_loss(model, loader)
    scores, _ = caption_scores(candidates, data.captions, tokenize, TOKENIZER)
    return {
        "images": len(data), "beam_size": beam_size, "perplexity": perplexity(nll, tokens),
        "unk_rate": unk_rate(data.all_captions, set(model.vocab.words), tokenize), **scores,
        **diagnostics(candidates, training_captions, model.vocab.words, tokenize),
    }  # fmt: skip


# ---------------------------------------------------------------------------- command line


def find_images(folder) -> list[Path]:
    """The image files in a folder and its subfolders, sorted. Raises DataError if there is none."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
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


def run(args) -> dict | None:
    """Caption the images; returns the metrics if there are reference captions."""
    device = pick_device(args.device)
    model = CaptionModel.from_checkpoint(args.checkpoint, device, args.precision)
    options = {"beam_size": args.beam_size}
    if not args.captions:
        paths = find_images(args.images)
        captions = model.caption(paths, **options)
        for path, caption in zip(paths, captions, strict=True):
            print(f"{path}: {caption}")
        if args.results:
            write_results(args.results, map(image_id_of, paths), captions)
        return None
    data = CocoCaptions(args.images, args.captions)
    features = extract_features(model.encoder, data.paths, model.transform, args.cache_dir).features
    if args.results:
        captions = caption_dataset(model, data, features=features, **options)
        write_results(args.results, data.image_ids, captions)
    loader = val_loader(data, model.vocab, features=features, cache_dir=args.cache_dir)
    return evaluate_captions(model, loader, **options)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Evaluate a captioning model.")
    parser.add_argument("checkpoint", help="best.pt of a run")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--captions", help="their reference captions, in COCO's format")
    parser.add_argument("--results", help="file for the captions, in COCO's results format")
    parser.add_argument("--beam-size", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", help="auto, float32 or bfloat16; default: the checkpoint's")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    try:
        metrics = run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if metrics:
        print(json.dumps(metrics, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
