"""The stages that bench.py times: for each a piece of work by this project, and the classic one.

    ours, classic = STAGES["encoding"]
    work = ours(setting)     # prepared, not yet begun
    work.run(200)            # do it for 200 images; returns how many it did

Training goes through `Trainer` and captioning through `caption_split`: what train.py runs is timed.
"""

import contextlib
import io
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import classic
import numpy as np
import torch
from made_data import end_at_length, write_captions, write_features
from torchvision.models import list_models, quantization

from data_loader import CaptionData, get_loader
from distributed import fast_precision, pick_device
from engine import caption_split
from features import encode_images, keep_freed_memory, suitable_batch, without_batch_norm
from model import EncoderCNN, eval_transform
from options import Options
from train import Trainer, build_model
from vocabulary import Vocabulary, pack

SIZES = {"embed_size": Options.embed_size, "hidden_size": Options.hidden_size}  # of both decoders


@dataclass(frozen=True)
class Setting:
    """What a stage works on; small, so that it can be sent to another process."""

    folder: str  # a temporary one, for all that is written
    images: str
    captions: str
    backbone: str = "resnet50"
    weights: str | None = None
    batch_size: int = 64
    tokenised: int = 25_000  # captions in the vocabulary stage
    decoded: int = 1_000  # images in the decoding stages

    @property
    def device(self):
        return pick_device("auto")


@dataclass
class Work:
    """`run(n)` works on n units and returns the number of items that this came to."""

    run: Callable[[int], int]
    smallest: int  # units of the first, untimed round
    largest: int


@cache
def data(setting):
    return CaptionData(setting.images, setting.captions)


def texts(setting):
    return [text for captions in data(setting).captions for text in captions]


def some_paths(setting, count):
    """`count` photos, over again if there are fewer."""
    return list(itertools.islice(itertools.cycle(data(setting).paths), count))


# ---------------------------------------------------------------------------- vocabulary, encoding


def ours_vocabulary(warm, setting):
    """From captions to a vocabulary and every caption's indices; `warm`: once more."""
    captions = texts(setting)[: setting.tokenised]

    def run(count):
        with TemporaryDirectory(dir=setting.folder) as empty:
            packed = pack(captions[:count], setting.folder if warm else empty)
        _, lengths = Vocabulary.from_counts(packed.counts(), threshold=5).encode_all(packed)
        return len(lengths)

    return Work(run, len(captions), len(captions))


def classic_vocabulary(setting):
    captions = texts(setting)[: setting.tokenised]
    return Work(lambda count: len(classic.tokenise(captions[:count])[1]), 500, len(captions))


def load(make_transform, setting):
    transform = make_transform()

    def run(count):
        for path in some_paths(setting, count):
            transform(path)
        return count

    return Work(run, 4, 1024)


@cache
def encoder(setting):
    torch.manual_seed(0)
    cnn = EncoderCNN(Options.embed_size, setting.backbone, setting.weights)
    return cnn.to(setting.device).eval()


@cache
def classic_loop(setting):
    pairs = zip(data(setting).paths, data(setting).captions, strict=True)
    paths = [path for path, captions in pairs for _ in captions]
    return classic.ClassicLoop(
        paths, texts(setting), setting.backbone, setting.device, **SIZES,
        batch_size=setting.batch_size,
    )  # fmt: skip


def in_batches(encode, images, count):
    """`images`, a ready batch, until `count` are done; returns how many were."""
    batches = -(-count // len(images))
    for _ in range(batches):
        encode(images)
    return batches * len(images)


def ours_forward(setting):
    """What features.encode_images does with a batch."""
    cnn, device = without_batch_norm(encoder(setting)), setting.device
    images = torch.rand(suitable_batch(device), 3, 224, 224)

    @torch.inference_mode()
    def encode(images):
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        with fast_precision(device):
            return cnn.pool(images).half().cpu().numpy()

    run = keep_freed_memory()(partial(in_batches, encode, images))
    return Work(run, len(images), 16_384)


def classic_forward(setting):
    images = torch.rand(setting.batch_size // 2, 3, 224, 224)
    return Work(partial(in_batches, classic_loop(setting).encode, images), len(images), 16_384)


def ours_encoding(setting):
    """From files on the disk to features on the disk."""

    def run(count):
        with quiet(), TemporaryDirectory(dir=setting.folder) as empty:
            paths = some_paths(setting, count)
            encode_images(encoder(setting), paths, eval_transform(224), empty)
        return count

    # Preparing the CNN takes half a second, which is nothing beside thousands of images.
    return Work(run, 2 * setting.batch_size, 4096)


def ours_encoding_int8(setting):
    return ours_encoding(replace(setting, backbone=in_int8(setting.backbone), weights=None))


def in_int8(backbone):
    """torchvision's name of the same network in int8, or None if there is none of it."""
    name = f"quantized_{backbone}"
    return name if name in list_models(module=quantization) else None


def classic_encoding(setting):
    loop = classic_loop(setting)

    def run(count):
        for start in range(0, count, loop.batch_size):
            places = range(start, min(start + loop.batch_size, count))
            loop.encode(loop.load_images([place % len(loop.paths) for place in places]))
        return count

    return Work(run, setting.batch_size // 2, 4096)


def quiet():
    """No progress bars inside the benchmark's own lines."""
    return contextlib.redirect_stdout(io.StringIO())


# ---------------------------------------------------------------------------- training


class ReadyTrainer(Trainer):
    """A Trainer whose images are encoded already: random features cost a step as much as real."""

    def look_at(self, data):
        file = Path(self.options.cache) / f"features-{len(data)}.npy"
        if not file.exists():
            write_features(file, len(data), self.model.encoder.feature_size)
        return np.load(file, mmap_mode="r"), {}

    def last_batches(self, count):
        """Train on the last `count` batches of an epoch; returns the number of captions in them."""
        steps = len(self.train_loader)
        self.step = max(steps - count, 0)
        captions = round((steps - self.step) / steps * len(self.train_loader.dataset))
        with quiet():
            self.train_epoch(threading.Event())
        return captions


def new_trainer(setting):
    """A run with the default options."""
    validation = Path(setting.folder) / "validation.json"
    if not validation.exists():
        write_captions(validation, images=100)
    return ReadyTrainer(Options(
        setting.images, setting.captions, setting.images, str(validation),
        out=str(Path(setting.folder) / "run"), cache=setting.folder,
        backbone=setting.backbone, weights=setting.weights, batch_size=setting.batch_size,
    ))  # fmt: skip


trainer = cache(new_trainer)


def ours_training(setting):
    return Work(trainer(setting).last_batches, 2, len(trainer(setting).train_loader))


def ours_training_float32(setting):
    """The same without bfloat16, where train.py would use it."""
    work = ours_training(setting)

    def run(count):
        with mock.patch("train.fast_precision", lambda device: contextlib.nullcontext()):
            return work.run(count)

    return Work(run, work.smallest, work.largest)


def classic_training(setting):
    loop = classic_loop(setting)

    def run(count):
        for _ in range(count):
            loop.step()
        return count * loop.batch_size

    return Work(run, 1, 1000)


# ---------------------------------------------------------------------------- decoding


@cache
def speaker(setting):
    """An untrained model whose captions end after about eleven words all the same.

    The image enters it as in the classic loop, whose decoder takes the same weights.
    """
    torch.manual_seed(0)
    options = replace(trainer(setting).options, inject="pre")
    model = build_model(options, trainer(setting).vocab).to(setting.device)
    end_at_length(model.decoder)
    return model.eval()


def ours_decoding(beam_size, setting, count=None):
    """`count`: all of this size, or fewer than `setting.decoded` if the data has fewer."""
    count = min(count or setting.decoded, len(data(setting)))
    train_data, rows = data(setting), trainer(setting).train_loader.dataset.features

    def run(count):
        few = train_data.without(range(count, len(train_data)))
        loader = get_loader(few, features=rows, mode="test", batch_size=setting.batch_size)
        return len(caption_split(speaker(setting), loader, beam_size))

    return Work(run, count, count)


def classic_decoding(beam_size, setting):
    model, rows = speaker(setting), trainer(setting).train_loader.dataset.features
    decoder = classic.Decoder(**SIZES, vocab_size=len(model.words)).to(setting.device).eval()
    decoder.load_state_dict(model.decoder.state_dict())
    search = classic.greedy if beam_size == 1 else partial(classic.beam, beam_size=beam_size)

    @torch.no_grad()
    def run(count):
        for row in rows[:count].astype(np.float32):
            feature = model.encoder(torch.from_numpy(row)[None].to(setting.device))
            model.text(search(decoder, feature))
        return count

    return Work(run, 4, min(setting.decoded, len(data(setting))))


STAGES = {  # name: (ours, classic, items)
    "vocabulary, first start": (
        partial(ours_vocabulary, False),
        classic_vocabulary,
        "captions",
    ),
    "vocabulary, later starts": (
        partial(ours_vocabulary, True),
        classic_vocabulary,
        "captions",
    ),
    "image pipeline": (
        partial(load, eval_transform),
        partial(load, classic.transform),
        "images",
    ),
    "encoder forward": (ours_forward, classic_forward, "images"),
    "encoding": (ours_encoding, classic_encoding, "images"),
    "encoding, int8": (ours_encoding_int8, classic_encoding, "images"),
    "training step": (ours_training, classic_training, "captions"),
    "training step, float32": (ours_training_float32, classic_training, "captions"),
    "greedy decoding": (partial(ours_decoding, 1), partial(classic_decoding, 1), "images"),
    "beam 3 decoding": (partial(ours_decoding, 3), partial(classic_decoding, 3), "images"),
}
