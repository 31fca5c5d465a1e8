"""Caption photographs: prints the path, the caption and its confidence, separated by tabs.

    python caption.py photo.jpg holiday          # of a folder, all images in it and its subfolders
    python caption.py photo.jpg --n-best 3       # the three best captions, each with its score
    python caption.py holiday --min-confidence 0.6          # leaves out doubtful captions
    python caption.py photo.jpg --maps maps      # pictures of the attention, in maps/photo.jpg
    find . -name "*.jpg" | python caption.py - --json captions.json

The confidence is the CIDEr-D to expect of the caption; models without calibration have no such
column. The higher the score of a caption, the more probable it is. A file that cannot be read is
named on standard error and left out; the exit status is then 1. `--json` writes COCO's results
format; the image ids are those of `captioning.data.image_files.image_id_of`.
"""

import argparse
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from captioning.base.commands import exit_status
from captioning.base.device import pick_device
from captioning.base.options import add_arguments, from_args
from captioning.data.coco import DataError
from captioning.data.image_files import check_results_path, find_images, image_id_of, write_results
from captioning.data.images import centre_crop
from captioning.decoding.generate import DecodingOptions
from model import PRETRAINED, CaptionModel

FEW = 32  # photos, for which no progress bar is shown
MAX_STEM = 60  # characters of a photo's name in the name of its picture: file systems limit names


# ---------------------------------------------------------------------------- command line


def run(args) -> int:
    """Caption the photos; returns the exit status, 1 if a file could not be read."""
    options, bad = from_args(DecodingOptions, args), []

    def on_bad(error):
        bad.append(error)
        tqdm.write(f"error: {error}", file=sys.stderr)

    paths = find_photos(args.photos, on_bad)
    if not paths:
        raise DataError("there is nothing to caption: give photos, folders, or paths to -")
    pictures = check_outputs(args, paths)
    model = CaptionModel.from_checkpoint(args.checkpoint, pick_device(args.device))
    model.check_confidence(args.min_confidence is not None)
    print(f"model: {model.card['summary']}", file=sys.stderr)
    torch.manual_seed(args.seed)
    results, doubtful = [], 0
    hide = len(paths) <= FEW or not sys.stderr.isatty()
    with tqdm(total=len(paths), unit="photo", leave=False, disable=hide) as bar:
        for found in model.describe(paths, bool(args.maps), on_bad, **vars(options)):
            bar.update()
            if args.min_confidence is not None and found.confidence < args.min_confidence:
                doubtful += 1
                continue
            print_captions(found, with_scores=args.n_best > 1)
            results.append((image_id_of(found.image), found.captions[0]))
            if args.maps:
                save_map(pictures[found.image], found, model.encoder.cnn.image_size)
    if doubtful:
        print(f"{doubtful} captions are below --min-confidence and left out", file=sys.stderr)
    if args.json:
        write_json(args.json, results)
    return 1 if bad else 0


def find_photos(arguments, on_bad) -> list[Path]:
    """The files that the arguments name: "-" stands for the lines of standard input.

    Of a folder, all its images, sorted. on_bad: gets the DataError of a folder without images.
    """
    paths = []
    for argument in arguments:
        if argument == "-":
            lines = [line.strip("\ufeff\r\n") for line in sys.stdin]  # also of Windows' files
            paths += find_photos([x for x in lines if x.strip() not in ("", "-")], on_bad)
        elif os.path.isdir(argument):  # unlike Path.is_dir, False for names that are too long
            try:
                paths += find_images(argument)
            except DataError as error:
                on_bad(error)
        else:
            paths.append(Path(argument))
    return paths


def check_outputs(args, paths) -> dict:
    """Raise OSError now rather than after the last photo, or return the files of `--maps`.

    These are {photo: picture}, in a folder that is created. A picture is named like its photo, with
    a number behind it if a photo in that folder or another picture has the name.
    """
    if args.json:
        check_results_path(args.json)
        if os.path.realpath(args.json) in map(os.path.realpath, paths):
            raise OSError(f"{args.json} is one of the photos and would be replaced; change --json")
    if not args.maps:
        return {}
    if os.path.exists(args.maps) and not os.path.isdir(args.maps):
        raise OSError(f"{args.maps} is not a folder; give --maps a folder for the pictures")
    folder, pictures = Path(args.maps), {}
    folder.mkdir(parents=True, exist_ok=True)
    inside = [path for path in paths if os.path.realpath(path.parent) == os.path.realpath(folder)]
    names = {path.stem.lower() for path in inside}  # file systems may not distinguish the case
    for path in paths:
        name, number = path.stem[:MAX_STEM], 2
        while name.lower() in names:
            name, number = f"{path.stem[:MAX_STEM]}-{number}", number + 1
        names.add(name.lower())
        pictures[path] = folder / f"{name}.jpg"
    return pictures


def save_map(file, found, size):
    """Save the attention for each word of the best caption as a picture."""
    import matplotlib.pyplot as plt  # takes a second, and is needed for pictures alone

    from captioning.figures.plots import attention_maps

    image = centre_crop(found.image, size)
    figure = attention_maps(image, found.captions[0], found.attention).flat[0].figure
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def print_captions(found, with_scores):
    """A line per caption: path, score if wanted, caption, and of the best one the confidence.

    `tqdm.write` keeps the bar below them.
    """
    known = [] if found.confidence is None else [f"{found.confidence:.2f}"]
    for caption, score in zip(found.captions, found.scores, strict=True):
        columns = [str(found.image), *([f"{score:.3f}"] if with_scores else []), caption, *known]
        tqdm.write("\t".join(columns), file=sys.stdout)
        known = []
    sys.stdout.flush()


def write_json(path, results):
    """Write (image id, caption) pairs in COCO's results format, and report ids that are not unique.

    COCO's API takes the captions of one id for captions of one image.
    """
    ids = [image_id for image_id, _ in results]
    write_results(path, ids, [caption for _, caption in results])
    repeated = [str(image_id) for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        print(f"{path}: several photos have the image id {', '.join(repeated)}", file=sys.stderr)


def parse_args(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Caption photographs.")
    parser.add_argument("photos", nargs="+", help="photos and folders; -: paths on standard input")
    add_arguments(parser, DecodingOptions)
    parser.add_argument("--min-confidence", type=float, help="leave out less certain captions")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling")
    parser.add_argument("--checkpoint", default=str(PRETRAINED), help="a checkpoint of train.py")
    parser.add_argument("--json", help="file for the captions, in COCO's results format")
    parser.add_argument("--maps", help="folder for pictures of the attention, PHOTO.jpg each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    args = parse_args(arguments)
    with warnings.catch_warnings():  # Pillow's, about files that it cannot read or reads anyway
        warnings.filterwarnings("ignore", module="PIL")
        return exit_status(lambda: run(args))


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout):  # file names need not be valid UTF-8
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.exit(main())
