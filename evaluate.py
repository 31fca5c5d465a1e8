"""Evaluate a model on images with reference captions: perplexity, BLEU, ROUGE-L, CIDEr-D.

    python evaluate.py runs/x/best.pt val2017 --captions annotations/captions_val2017.json
    python evaluate.py runs/0/best.pt val2017 --captions C --ensemble runs/1/best.pt runs/2/best.pt

Prints the metrics as JSON. `--instances` adds CHAIR, the share of captions that name an object
that is not in the picture; `--retrieval`, how often the right caption of an image, and the right
image of a caption, are among the first 1, 5 and 10 of those that the model ranks. `--results` also
writes the captions in COCO's results format, exactly `[{"image_id": .., "caption": ..}]`. Images
without reference captions: see caption.py.
"""

import argparse
import json
import sys

from captioning.base.commands import exit_status
from captioning.base.device import pick_device
from captioning.base.options import add_arguments, from_args
from captioning.data.coco import CocoCaptions
from captioning.data.extraction import extract_features
from captioning.data.features import PerModel, Views
from captioning.data.image_files import check_results_path, write_results
from captioning.decoding.ensemble import Ensemble
from captioning.decoding.generate import DecodingOptions
from captioning.scoring.chair import chair, objects_of
from captioning.scoring.evaluation import evaluate_split
from captioning.scoring.retrieval import retrieval
from data_loader import CaptionDataset, ImageDataset, get_loader
from model import CaptionModel

BATCH_SIZE = 512  # captions


def run(args) -> dict:
    """The metrics of the model, or of the ensemble of several models."""
    options = from_args(DecodingOptions, args)
    if options.n_best > 1:
        raise ValueError("one caption per image is evaluated: leave --n-best out")
    if args.retrieval < 0:
        raise ValueError(f"--retrieval is {args.retrieval}, but must be a number of images")
    if args.results:
        check_results_path(args.results)
    device = pick_device(args.device)
    paths = [args.checkpoint, *args.ensemble]
    models = [CaptionModel.from_checkpoint(path, device, args.precision) for path in paths]
    model = Ensemble(models) if args.ensemble else models[0]
    data = CocoCaptions(args.images, args.captions)
    objects = objects_of(data.image_ids, args.instances) if args.instances else None
    features = [features_of(member, data, args.cache_dir) for member in models]
    features = PerModel(features) if args.ensemble else features[0]
    dataset = CaptionDataset(data, model.vocab, features=features)
    loader, images = get_loader(dataset, "val", BATCH_SIZE), ImageDataset(data, features=features)
    metrics, captions = evaluate_split(model, loader, images, **vars(options))
    if objects is not None:
        metrics |= chair(captions, data.captions, objects)
    if args.retrieval:
        rows = range(args.retrieval, len(data))
        first = data.without(set(rows))
        metrics |= retrieval(model, ImageDataset(first, features=features))
    if args.results:
        write_results(args.results, data.image_ids, captions)
    return {"models": len(models), **metrics}


def features_of(model, data, cache_dir) -> Views:
    """The features that the model's CNN computes of the images."""
    precision, cnn = model.config.precision, model.encoder.cnn
    array = extract_features(cnn, data.paths, model.transform, cache_dir, precision)
    return Views([array])


def parse_args(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a captioning model.")
    parser.add_argument("checkpoint", help="best.pt of a run")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--captions", required=True, help="their captions, in COCO's format")
    parser.add_argument("--instances", help="their instance annotations, in COCO's format")
    parser.add_argument("--retrieval", type=int, default=0, help="recall among so many images")
    parser.add_argument("--results", help="file for the captions, in COCO's results format")
    parser.add_argument("--ensemble", nargs="+", default=[], help="checkpoints to average with")
    add_arguments(parser, DecodingOptions)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", help="auto, float32 or bfloat16; default: the checkpoint's")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    return exit_status(lambda: print(json.dumps(run(parse_args(arguments)), indent=2)))


if __name__ == "__main__":
    sys.exit(main())
