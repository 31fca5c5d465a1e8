"""The stages of this project that bench.py measures.

    python benchmarks/stages.py training data scratch      # see rounds.serve

What is measured is what train.py and evaluate.py run. data: a folder that random_data.py has
written; scratch: a folder for features and runs.
"""

import itertools
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

# The project's modules are one folder up, where `python benchmarks/stages.py` does not search.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from random_data import end_at_length
from rounds import serve

from captioning.base.device import pick_device
from captioning.base.tokens import END
from captioning.data.coco import CocoCaptions
from captioning.data.extraction import SHARD_SIZE, extract_features, fingerprint, shard_file
from captioning.data.images import eval_transform
from captioning.learning.loop import train_one_epoch
from captioning.learning.train_config import TrainConfig
from captioning.scoring.evaluation import caption_split, evaluate_loss
from model import EncoderCNN
from train import build_model, build_run

BATCHES = 16  # per unit of training


def images(data, scratch):
    """Opening and resizing."""
    transform, paths = eval_transform(224), sorted((data / "images").iterdir())
    for path in itertools.cycle(paths):
        transform(path)
        yield 1


def extraction(data, scratch):
    """From image files to features on the disk."""
    torch.manual_seed(0)
    cnn = EncoderCNN(weights=None).to(pick_device("auto")).cnn
    paths = sorted((data / "images").iterdir())
    while True:
        with TemporaryDirectory(dir=scratch) as empty:
            extract_features(cnn, paths, eval_transform(224), empty)
        yield len(paths)


# ---------------------------------------------------------------------------- with a run


def random_config(data, scratch, inject):
    """The default options, and random features of the images."""
    config = TrainConfig(
        train_images=str(data / "images"),
        train_captions=str(data / "train.json"),
        val_images=str(data / "images"),
        val_captions=str(data / "val.json"),
        out=str(scratch / "run"),
        cache_dir=str(scratch),
        weights=None,
        inject=inject,
    )
    write_features(config)
    return config


def write_features(config):
    """Write random features where `build_run(config)` looks for those that are already computed.

    All files but the last are links to the first, because the features of COCO would take 25 GB.
    """
    torch.manual_seed(config.seed)  # the random weights of the run's CNN, which name the files
    data = CocoCaptions(config.train_images, config.train_captions)
    model = build_model(config, data).to(pick_device(config.device))
    cnn, rng = model.encoder.cnn, np.random.default_rng(0)
    with torch.no_grad():
        shape = cnn.views(torch.zeros(1, 3, 224, 224, device=model.device)).shape[1:]
    features = rng.standard_normal((SHARD_SIZE, *shape), dtype=np.float32).astype("f2")
    for split in (data, CocoCaptions(config.val_images, config.val_captions)):
        name = fingerprint(cnn, split.paths, model.transform, config.precision)
        folder = Path(config.cache_dir) / f"features-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(split), SHARD_SIZE):
            if 0 < start <= len(split) - SHARD_SIZE:
                shard_file(folder, start).hardlink_to(shard_file(folder, 0))
            else:
                np.save(shard_file(folder, start), features[: len(split) - start])


def start(data, scratch):
    """From the command to the first batch, if features and words are there; items: captions."""
    config = random_config(data, scratch, "par")
    while True:
        run = build_run(config)
        run.lock.close()
        yield len(run.train_loader.dataset)


def last_batches(run):
    """(the first of the last `BATCHES` batches of an epoch, the number of their captions)."""
    batches, captions = len(run.train_loader), len(run.train_loader.dataset)
    first = max(batches - BATCHES, 0)
    return first, round(captions * (batches - first) / batches)


def training(inject, data, scratch):
    run = build_run(random_config(data, scratch, inject))
    first, captions = last_batches(run)
    while True:
        run.progress.step = first
        train_one_epoch(run, run.loss, lambda norm: None)
        if run.model.device.type == "cuda":
            torch.cuda.synchronize()
        yield captions


def loader(inject, data, scratch):
    """The batches of training, without training."""
    run = build_run(random_config(data, scratch, inject))
    first, captions = last_batches(run)
    while True:
        run.train_loader.batch_sampler.set_epoch(0, first)
        for _ in run.train_loader:
            pass
        yield captions


def validation(inject, data, scratch):
    run = build_run(random_config(data, scratch, inject))
    while True:
        evaluate_loss(run.model, run.val_loader)
        yield len(run.val_loader.dataset)


def captioning(inject, data, scratch):
    """Beam search from features."""
    run = build_run(random_config(data, scratch, inject))
    end_at_length(run.model.decoder, END)
    while True:
        caption_split(run.model, run.val_images, beam_size=3)
        yield len(run.val_images)


STAGES = {"images": images, "extraction": extraction, "start": start}
for stage in (training, loader, validation, captioning):
    STAGES[stage.__name__] = partial(stage, "par")
    STAGES[f"{stage.__name__}-attend"] = partial(stage, "attend")

if __name__ == "__main__":
    serve(STAGES)
