"""The stages that bench.py measures: for each, the work of this project and of the classic loop.

    stage = STAGES["feature extraction"]
    work = stage.ours(setting)     # prepared, not started
    work.run(200)                  # for 200 images; returns how many were processed

What is measured is what train.py runs: `extract_features`, `train_one_epoch`, `caption_images`.
"""

import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from tempfile import TemporaryDirectory
from typing import NamedTuple

import classic
import numpy as np
import torch
from setting import (
    SIZES,
    Setting,
    Work,
    captioner,
    classic_loop,
    data,
    encoder,
    hide_output,
    some_paths,
    training_run,
)
from torchvision.models import list_models, quantization

from captioning.data.features import (
    default_batch_size,
    extract_features,
    forward_batch,
    optimized_for_inference,
    reuse_freed_memory,
)
from captioning.data.images import eval_transform
from captioning.learning.losses import SelfCritical
from captioning.learning.reward import CiderD
from data_loader import image_loader, tokenize_all
from evaluate import caption_images
from train import train_one_epoch
from vocabulary import Vocabulary

# ---------------------------------------------------------------------------- vocabulary, images


def vocabulary(warm, setting):
    """From captions to a vocabulary and the indices of every caption; `warm`: from the cache."""
    captions = data(setting).all_captions[: setting.tokenized]

    def run(count):
        with TemporaryDirectory(dir=setting.folder) as empty:
            tokenized = tokenize_all(captions[:count], setting.folder if warm else empty)
        _, lengths = tokenized.encode(Vocabulary.from_counts(tokenized.counts(), threshold=5))
        return len(lengths)

    return Work(run, len(captions), len(captions))


def classic_vocabulary(setting):
    captions = data(setting).all_captions[: setting.tokenized]
    return Work(lambda count: len(classic.tokenize(captions[:count])[1]), 500, len(captions))


def load_images(make_transform, setting):
    transform = make_transform()

    def run(count):
        for path in some_paths(setting, count):
            transform(path)
        return count

    return Work(run, 4, 1024)


# ---------------------------------------------------------------------------- features


def repeat_batch(encode, images, count):
    """Encode the same batch until `count` images are done; returns how many were."""
    batches = -(-count // len(images))
    for _ in range(batches):
        encode(images)
    return batches * len(images)


def encoder_forward(setting):
    """What `extract_features` does with a batch of images."""
    network, device = optimized_for_inference(encoder(setting)), setting.device
    images = torch.rand(default_batch_size(device), 3, 224, 224)

    @torch.inference_mode()
    def encode(images):
        forward_batch(network, list(images), device)

    run = reuse_freed_memory()(partial(repeat_batch, encode, images))
    return Work(run, len(images), 16_384)


def classic_encoder_forward(setting):
    images = torch.rand(setting.batch_size // 2, 3, 224, 224)
    return Work(partial(repeat_batch, classic_loop(setting).encode, images), len(images), 16_384)


def feature_extraction(setting):
    """From image files to features on the disk."""

    def run(count):
        with hide_output(), TemporaryDirectory(dir=setting.folder) as empty:
            paths = some_paths(setting, count)
            extract_features(encoder(setting), paths, eval_transform(224), empty)
        return count

    # Preparing the CNN takes half a second, which is negligible for thousands of images.
    return Work(run, 2 * setting.batch_size, 4096)


def feature_extraction_int8(setting):
    int8 = replace(setting, backbone=int8_name(setting.backbone), weights=None)
    return feature_extraction(int8)


def int8_name(backbone):
    """torchvision's name of the int8 version of a network, or None if there is none."""
    name = f"quantized_{backbone}"
    return name if name in list_models(module=quantization) else None


def classic_feature_extraction(setting):
    loop = classic_loop(setting)

    def run(count):
        for start in range(0, count, loop.batch_size):
            indices = range(start, min(start + loop.batch_size, count))
            loop.encode(loop.load_images([index % len(loop.paths) for index in indices]))
        return count

    return Work(run, setting.batch_size // 2, 4096)


# ---------------------------------------------------------------------------- training


def train_last_batches(run, count):
    """Train on the last `count` batches of an epoch; returns the number of captions in them."""
    steps, captions = len(run.train_loader), len(run.train_loader.dataset)
    run.progress.step = max(steps - count, 0)
    captions = round((1 - run.progress.step / steps) * captions)
    with hide_output():
        train_one_epoch(run, after_update=lambda norm: None)
    return captions


def training(precision, setting):
    run = training_run(setting, precision)
    return Work(partial(train_last_batches, run), 2, len(run.train_loader))


def attend_training(setting):
    return training("auto", replace(setting, inject="attend"))


def reward_share(setting, steps=3):
    """The part of the time of a self-critical step that its reward takes."""
    run = training_run(replace(setting, inject="attend"))
    data, seconds = run.train_loader.dataset, []
    reward = CiderD(data.ids, data.lengths, data.image_rows, len(run.model.vocab))

    def timed_reward(*arrays):
        start = time.perf_counter()
        result = reward(*arrays)
        seconds.append(time.perf_counter() - start)
        return result

    loss = SelfCritical(run.model.eval(), timed_reward, precomputed=True)
    start = time.perf_counter()
    for batch in islice(run.train_loader, steps):
        loss(*batch)[0].backward()
    return sum(seconds) / (time.perf_counter() - start)


def classic_training(setting, cached=False):
    """cached: from features in memory, without opening and encoding images."""
    loop = copy(classic_loop(setting))
    if cached:
        features = torch.randn(loop.batch_size, loop.embed.in_features, device=loop.device)
        loop.load_images, loop.encode = lambda indices: None, lambda images: features

    def run(count):
        for _ in range(count):
            loop.step()
        return count * loop.batch_size

    return Work(run, 1, 1000)


# ---------------------------------------------------------------------------- decoding


def decoding(beam_size, setting, count=None):
    """Captions of `count` images, by default `setting.decoded`, given their features."""
    images, features = data(setting), training_run(setting).train_loader.dataset.features
    count = min(count or setting.decoded, len(images))

    def run(count):
        few = images.without(range(count, len(images)))
        loader = image_loader(few, features=features, batch_size=setting.batch_size)
        return len(caption_images(captioner(setting), loader, beam_size))

    return Work(run, count, count)


def classic_decoding(beam_size, setting):
    model, features = captioner(setting), training_run(setting).train_loader.dataset.features
    decoder = classic.Decoder(**SIZES, vocab_size=len(model.vocab)).to(setting.device).eval()
    decoder.load_state_dict(model.decoder.state_dict())
    search = classic.greedy if beam_size == 1 else partial(classic.beam, beam_size=beam_size)

    @torch.no_grad()
    def run(count):
        for (row,) in features[:count].astype(np.float32):  # (1, feature_size)
            feature = model.encoder.project(torch.from_numpy(row)[None].to(setting.device))
            model.vocab.decode(search(decoder, feature))
        return count

    return Work(run, 4, min(setting.decoded, len(data(setting))))


# ---------------------------------------------------------------------------- all stages


class Stage(NamedTuple):
    ours: Callable[[Setting], Work]
    classic: Callable[[Setting], Work]  # in float32
    items: str
    precision: str | None = None  # of this project's side, where a network computes


STAGES = {
    "vocabulary, first start": Stage(partial(vocabulary, False), classic_vocabulary, "captions"),
    "vocabulary, later starts": Stage(partial(vocabulary, True), classic_vocabulary, "captions"),
    "image pipeline": Stage(
        partial(load_images, eval_transform), partial(load_images, classic.transform), "images"
    ),
    "encoder forward": Stage(encoder_forward, classic_encoder_forward, "images", "auto"),
    "feature extraction": Stage(feature_extraction, classic_feature_extraction, "images", "auto"),
    "feature extraction, int8": Stage(
        feature_extraction_int8, classic_feature_extraction, "images", "int8"
    ),
    "training step": Stage(partial(training, "auto"), classic_training, "captions", "auto"),
    "training step, float32": Stage(
        partial(training, "float32"), classic_training, "captions", "float32"
    ),
    "training step, cached": Stage(
        partial(training, "auto"), partial(classic_training, cached=True), "captions", "auto"
    ),
    "training step, attend": Stage(attend_training, classic_training, "captions", "auto"),
    "greedy decoding": Stage(partial(decoding, 1), partial(classic_decoding, 1), "images", "auto"),
    "beam 3 decoding": Stage(partial(decoding, 3), partial(classic_decoding, 3), "images", "auto"),
}
