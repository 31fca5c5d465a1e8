"""Shared fixtures: a dozen random images with captions, and the config of a tiny model.

Everything runs offline, on the CPU, with a random CNN whose features differ: see `calibrate`.
"""

import functools
import json
import os
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import settings
from PIL import Image

from captioning.base.device import resolve_precision
from captioning.learning.train_config import TrainConfig
from model import CaptionModel, ModelConfig
from vocabulary import Vocabulary

settings.register_profile("patient", deadline=None)  # tests may be slow on a busy machine
settings.load_profile("patient")

SCRATCH = tempfile.TemporaryDirectory()  # deleted when Python exits

CAPTIONS = [
    ["a cat", "a small grey cat", "one cat sits"],
    ["a dog runs across the wide green grass", "a dog on grass"],
    ["two men ride a red bus", "men on a bus to the old town"],
    ["a cup", "a white cup of tea", "the cup on a table"],
    ["a woman rides a horse along the beach at dusk", "a horse"],
    ["a red kite", "the kite flies over the beach"],
    ["an old clock on the wall of a station", "a clock"],
    ["a plate of food", "food on a plate with a fork and a knife"],
    ["a green bird", "a bird on a branch"],
    ["two dogs", "two dogs play with a ball in the park"],
    ["a boat on the lake", "a small boat"],
    ["a street at night", "cars on a street at night in the rain"],
]


SLOW = ("test_notebooks.py", "test_learning.py", "test_run_files.py")


def pytest_collection_modifyitems(items):
    """Slow files first, so that no worker process is still busy when the others are done."""
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tests are too small to benefit from more threads; OMP_NUM_THREADS overrides this."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@pytest.fixture(autouse=True)
def close_figures():
    """No test leaves matplotlib's figures open, which would warn in a later one."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def supported(precision):
    """ "float32" or "bfloat16", as `resolve_precision`; skips the test if this CPU has none."""
    try:
        return resolve_precision("cpu", precision)
    except ValueError as unsupported:
        pytest.skip(str(unsupported))


class MakeFolder:
    """An object whose unpickling creates a folder: code in a file that must not be run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def calibrate(network):
    """Fit the BatchNorm statistics of a random network to noise, in place.

    Otherwise the features shrink layer by layer, to 1e-9, and are the same for all images.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # use the exact statistics
    blocks = 4 * torch.rand(32, 3, 4, 4) - 2
    with torch.no_grad():
        network.train()(blocks.repeat_interleave(16, 2).repeat_interleave(16, 3))
    return network.eval()


@functools.cache
def calibrated_weights() -> str:
    """A state dict of mobilenet_v3_small, in a file."""
    torch.manual_seed(0)
    network = calibrate(torchvision.models.mobilenet_v3_small(weights=None))
    torch.save(network.state_dict(), f"{SCRATCH.name}/weights.pt")
    return f"{SCRATCH.name}/weights.pt"


WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "runs", "sits"]


def tiny_model(words=WORDS, **changes) -> CaptionModel:
    """A model with that CNN and a random decoder, in float32."""
    settings = {
        "backbone": "mobilenet_v3_small",
        "image_size": 64,
        "embed_size": 16,
        "hidden_size": 16,
        "precision": "float32",
    }
    config = ModelConfig(**settings | changes)
    return CaptionModel(Vocabulary(words, 2), config, calibrated_weights())


def write_dataset(folder: Path) -> Path:
    """COCO's layout: folder/images/00.jpg .. 11.jpg, 48x48, and folder/captions.json."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, captions in enumerate(CAPTIONS):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        name = f"{number:02}.jpg"
        Image.fromarray(blocks).resize((48, 48), Image.Resampling.NEAREST).save(
            folder / "images" / name
        )
        images.append({"id": 100 + number, "file_name": name})
        for caption in captions:
            annotation = {"id": len(annotations), "image_id": 100 + number, "caption": caption}
            annotations.append(annotation)
    content = {"images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def tiny_config(folder: Path, **changes) -> TrainConfig:
    """A config to train on `write_dataset(folder)` within a second or two, in float32."""
    settings = {
        "train_images": str(folder / "images"),
        "train_captions": str(folder / "captions.json"),
        "val_images": str(folder / "images"),
        "val_captions": str(folder / "captions.json"),
        "out": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "backbone": "mobilenet_v3_small",
        "weights": calibrated_weights(),
        "image_size": 64,
        "embed_size": 16,
        "hidden_size": 16,
        "min_word_freq": 1,
        "epochs": 2,
        "batch_size": 8,
        "grad_accum_steps": 1,
        "dropout": 0.3,
        "precision": "float32",
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})


def command_line(config):
    """The command-line arguments of `config`."""
    return [word for f in fields(TrainConfig) for word in flag(f.name, getattr(config, f.name))]


def flag(name, value):
    """An option as command-line arguments."""
    name = "--" + name.replace("_", "-")
    return [name] * value if isinstance(value, bool) else [name, str(value)]


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset that the test may modify."""
    return write_dataset(tmp_path / "data")


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory) -> Path:
    """A read-only dataset for a whole module."""
    return write_dataset(tmp_path_factory.mktemp("shared") / "data")
