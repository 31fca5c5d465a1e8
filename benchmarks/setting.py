"""What the stages of bench.py work on: the data, and the models and runs that are prepared once.

setting = Setting("a temporary folder", "images", "captions.json")
encoder(setting), training_run(setting), captioner(setting), classic_loop(setting)

The cached functions return the same object whenever they are called with the same setting.
"""

import contextlib
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import classic
import torch
from random_data import end_at_length, write_random_captions, write_random_features

from captioning.base.distributed import pick_device
from captioning.data.coco import CocoCaptions
from captioning.data.features import fingerprint
from captioning.learning.options import TrainConfig
from captioning.learning.run import build_model, build_run
from model import CaptionModel, EncoderCNN

SIZES = {"embed_size": TrainConfig.embed_size, "hidden_size": TrainConfig.hidden_size}


@dataclass(frozen=True)
class Setting:
    """What a stage works on: names and numbers only, because it is sent to other processes."""

    folder: str  # a temporary one, for all files that are written
    images: str
    captions: str
    backbone: str = "resnet50"
    weights: str | None = None
    inject: str = "par"
    batch_size: int = 64
    tokenized: int = 25_000  # captions in the vocabulary stage
    decoded: int = 1_000  # images in the decoding stages

    @property
    def device(self):
        return pick_device("auto")


@dataclass
class Work:
    """`run(n)` works on n units and returns the number of items in them."""

    run: Callable[[int], int]
    smallest: int  # units of the first, untimed round
    largest: int


@cache
def data(setting):
    return CocoCaptions(setting.images, setting.captions)


def some_paths(setting, count):
    """`count` image files, repeated if there are fewer."""
    return list(itertools.islice(itertools.cycle(data(setting).paths), count))


def hide_output():
    return contextlib.redirect_stdout(io.StringIO())


# ---------------------------------------------------------------------------- models and runs


@cache
def encoder(setting):
    torch.manual_seed(0)
    network = EncoderCNN(SIZES["embed_size"], setting.backbone, setting.weights)
    return network.to(setting.device).eval()


def train_config(setting, precision="auto"):
    """The default options; validation is not measured and gets only a few images."""
    validation = Path(setting.folder) / "validation.json"
    if not validation.exists():
        write_random_captions(validation, images=100)
    return TrainConfig(
        train_images=setting.images,
        train_captions=setting.captions,
        val_images=setting.images,
        val_captions=str(validation),
        out=str(Path(setting.folder) / "run"),
        cache_dir=setting.folder,
        backbone=setting.backbone,
        weights=setting.weights,
        batch_size=setting.batch_size,
        precision=precision,
        inject=setting.inject,
    )


def cache_random_features(config):
    """Random features where `build_run(config)` looks for those that are already computed."""
    torch.manual_seed(config.seed)  # the random weights of the run's CNN, which name the files
    splits = [
        CocoCaptions(config.train_images, config.train_captions),
        CocoCaptions(config.val_images, config.val_captions),
    ]
    model = build_model(config, splits[0]).to(pick_device(config.device))
    image = torch.zeros(1, 3, model.encoder.image_size, model.encoder.image_size)
    with torch.no_grad():
        shape = model.encoder.forward_views(image.to(model.device)).shape[1:]
    for split in splits:
        name = fingerprint(model.encoder, split.paths, model.transform)
        folder = Path(config.cache_dir) / f"features-{name}"
        if not folder.exists():
            write_random_features(folder, len(split), shape)


@cache
def training_run(setting, precision="auto"):
    config = train_config(setting, precision)
    cache_random_features(config)
    return build_run(config)


@cache
def captioner(setting):
    """An untrained model whose captions nevertheless end after about eleven words.

    The image enters it as in the classic loop, whose decoder loads the same weights.
    """
    torch.manual_seed(0)
    run = training_run(setting)
    config = replace(run.config.model_config(), inject="pre")
    model = CaptionModel(run.model.vocab.words, config, setting.weights).to(setting.device)
    end_at_length(model.decoder)
    return model.eval()


@cache
def classic_loop(setting):
    pairs = zip(data(setting).paths, data(setting).captions, strict=True)
    paths = [path for path, captions in pairs for _ in captions]
    return classic.ClassicLoop(
        paths,
        data(setting).all_captions,
        setting.backbone,
        setting.device,
        **SIZES,
        batch_size=setting.batch_size,
    )
