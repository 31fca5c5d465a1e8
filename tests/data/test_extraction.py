"""Features of images: what is computed, when it is loaded instead, and images that are unreadable.

The oracle computes one image at a time, without a cache.
"""

import io
import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import calibrated_weights, supported
from PIL import Image
from torchvision.transforms import v2

from captioning.base.device import resolve_precision
from captioning.data import extraction, images
from captioning.data.extraction import (
    ReadableImages,
    extract_features,
    find_bad_images,
    fingerprint,
)
from captioning.data.images import BadImageError, centre_crop, eval_transform
from captioning.networks.cnn import CNN

transform = eval_transform(64)


def new_cnn(cnn_class=CNN, **options):
    return cnn_class("mobilenet_v3_small", calibrated_weights(), image_size=64, **options)


@pytest.fixture(scope="module")
def cnn():
    return new_cnn()


@pytest.fixture
def paths(dataset):
    return sorted((dataset / "images").iterdir())


@pytest.fixture
def extract(cnn, tmp_path):
    """`extract_features` in float32."""

    def run(paths, cnn=cnn, transform=transform, precision="float32", **options):
        return extract_features(cnn, paths, transform, tmp_path, precision, **options)

    return run


@pytest.fixture
def opened(monkeypatch):
    """The image files that are opened, in order."""
    files, original = [], images.open_image

    def recorded(file, *options):
        files.append(Path(file.name))
        return original(file, *options)

    monkeypatch.setattr(images, "open_image", recorded)
    return files


@pytest.fixture
def small_shards(monkeypatch):
    """Five images per file: the dozen images make three files, the last one smaller."""
    monkeypatch.setattr(extraction, "SHARD_SIZE", 5)


def assert_right(found, cnn, paths, transform=transform):
    with torch.no_grad():
        expected = torch.cat([cnn.eval().views(transform(p)[None]) for p in paths]).numpy()
    assert found.shape == expected.shape and found[[0]].dtype == np.float16
    np.testing.assert_allclose(found[range(len(found))], expected, rtol=2e-3, atol=1e-3)


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"pooled": False}, {"fine_tune": "all"}], ids=str
)
def test_features(paths, extract, options):
    """The features are those of the CNN in eval mode, of each view and each position, in float16;
    the CNN keeps the mode that it was in."""
    cnn = new_cnn(**options).train()
    found = extract(paths, cnn)
    assert cnn.training == ("fine_tune" in options)
    assert_right(found, cnn, paths)
    assert found.shape[:3] == (12, 1 + cnn.flip, 1 if cnn.pooled else 4)


def test_worker_processes(cnn, extract, paths):
    """Worker processes give the same features; what they get can be pickled."""
    images = pickle.loads(pickle.dumps(ReadableImages(paths, transform)))
    assert torch.equal(images[3][0], transform(paths[3]))
    assert_right(extract(paths, num_workers=2), cnn, paths)


# ---------------------------------------------------------------------------- the cache


def test_second_call_opens_no_image(cnn, extract, paths, opened, small_shards):
    """Features are computed into files, and loaded from them without opening an image."""
    for _ in range(2):
        found = extract(paths)
        assert opened == paths
    assert [len(np.load(file)) for file in found.files] == [5, 5, 2]
    assert_right(found, cnn, paths)


def grey(image, size, interpolation):
    return centre_crop(image, size, interpolation).convert("L").convert("RGB")


class Squared(CNN):
    def views(self, images):
        return super().views(images) ** 2


INPUTS = ["weights", "image", "time", "size", "order", "flip", "pooled", "precision"]
CODE = ["transform", "class", "layers"]


@pytest.mark.parametrize("change", INPUTS + CODE)
def test_other_input_is_computed(paths, extract, opened, change):
    """Features of another CNN, precision, transform or images are not used for these, also if the
    weights are the same and only the code differs."""
    cnn, transform, precision = new_cnn(), eval_transform(64), "float32"
    extract(paths, cnn, transform)
    opened.clear()
    if change == "weights":
        cnn.network.state_dict()["features.0.0.weight"][0, 0, 0, 0] += 1e-3
    if change == "image":
        Image.new("RGB", (48, 48), "red").save(paths[3])
    if change == "time":
        os.utime(paths[0], (1, 1))
    if change == "size":
        transform = eval_transform(80)
    if change == "order":
        paths.reverse()
    if change in ("flip", "pooled"):
        cnn = new_cnn(**{change: change == "flip"})
    if change == "precision":
        precision = supported("bfloat16")
    if change == "transform":
        usual, crop = repr(transform), partial(grey, size=64, interpolation="bilinear")
        transform = v2.Compose([v2.Lambda(crop), *transform.transforms[1:]])
        assert repr(transform) == usual
    if change == "class":
        cnn = new_cnn(Squared)
    if change == "layers":
        cnn.network.avgpool = torch.nn.AdaptiveMaxPool2d(1)
    found = extract(paths, cnn, transform, precision)
    assert opened == paths
    if change != "precision":  # the oracle computes in float32
        assert_right(found, cnn, paths, transform)


def test_precision_auto(cnn, paths):
    """The cache of precision "auto" is that of the precision it selects."""
    selected = resolve_precision("cpu", "auto")
    auto, same, float32 = (
        fingerprint(cnn, paths, transform, precision) for precision in ("auto", selected, "float32")
    )
    assert auto == same and (auto == float32) == (selected == "float32")


def test_runs_that_share_a_cache(cnn, extract, paths, opened):
    """Of two runs that need the same features at the same time, one computes them for both."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(extract, paths) for _ in range(2)]
        found = [job.result() for job in jobs]
    assert sorted(opened) == paths
    for array in found:
        assert_right(array, cnn, paths)


# ---------------------------------------------------------------------------- faults


def test_interruption(cnn, extract, paths, opened, monkeypatch, small_shards):
    """After an interruption, at most one file of features is computed again."""
    original, calls = CNN.views, []

    def views(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # after the probe and the first file
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CNN, "views", views)
        with pytest.raises(KeyboardInterrupt):
            extract(paths)
    opened.clear()
    found = extract(paths)
    assert opened == paths[5:]
    assert_right(found, cnn, paths)


@pytest.mark.parametrize("damage", ["truncated", "empty", "deleted", "too short", "no array"])
def test_damaged_shard(cnn, extract, paths, tmp_path, opened, damage, small_shards):
    """A damaged or deleted file of features is computed again, and only this one."""
    extract(paths)
    file = sorted(tmp_path.glob("*/*.npy"))[1]
    content = file.read_bytes()
    file.unlink()
    if damage == "too short":
        np.save(file, np.load(io.BytesIO(content))[:4])
    elif damage != "deleted":
        damaged = {"truncated": content[:-100], "empty": b"", "no array": b"text" * 99}
        file.write_bytes(damaged[damage])
    opened.clear()
    found = extract(paths)
    assert opened == paths[5:10]
    assert_right(found, cnn, paths)


def test_shards_of_another_rank_are_missing(cnn, extract, paths, monkeypatch, small_shards):
    """Files that another rank did not write are an error, and are computed at the next start."""
    compute = extraction.compute_shards
    with monkeypatch.context() as patch:
        patch.setattr(
            extraction, "compute_shards", lambda *args: compute(*args[:4], args[4][:-1], *args[5:])
        )
        with pytest.raises(OSError, match="00000010.npy is missing"):
            extract(paths)
    assert_right(extract(paths), cnn, paths)


def test_too_small_a_disk(cnn, extract, paths, tmp_path, monkeypatch, small_shards):
    """A disk without room for all missing features is an error before any image is encoded."""
    usage, needed = namedtuple("usage", "total used free"), 12 * cnn.feature_size * 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, needed - 1))
        with pytest.raises(OSError, match="choose another --cache-dir") as caught:
            extract(paths)
        assert len(str(caught.value).splitlines()) == 1
        assert not list(tmp_path.glob("*/*.npy"))
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, needed))
        assert_right(extract(paths), cnn, paths)


# ---------------------------------------------------------------------------- bad images


def test_no_random_numbers_are_drawn(extract, paths):
    """The random numbers of a program are the same whether features are computed or loaded."""
    before = torch.get_rng_state()
    extract(paths)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_images(cnn, extract, paths, opened, small_shards):
    """An error names all images that cannot be read, and no other. Files with such an image are not
    written, so that its next version is encoded; the others need not be computed again.
    """
    bad_rows = [2, *range(5, 10)]  # with all images of a file
    contents = [path.read_bytes() for path in paths]
    for row in bad_rows:
        paths[row].write_bytes(b"no image")
    paths[2].unlink()
    assert sorted(find_bad_images(paths, transform)) == bad_rows
    for _ in range(2):
        opened.clear()
        with pytest.raises(BadImageError) as caught:
            extract(paths)
        named = [row for row, path in enumerate(paths) if str(path) in str(caught.value)]
        assert named == bad_rows
    assert not set(opened) & set(paths[10:])
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert_right(extract(paths), cnn, paths)


def test_image_that_recovers(cnn, extract, paths, monkeypatch):
    """An image that was temporarily unreadable is encoded by the next call that can read it."""
    original, failing = images.open_image, [paths[5]]

    def fail_once(file, *options):
        if Path(file.name) in failing:
            failing.remove(Path(file.name))
            raise OSError("the network is down")
        return original(file, *options)

    monkeypatch.setattr(images, "open_image", fail_once)
    with pytest.raises(BadImageError, match=f"{paths[5].name}: the network is down"):
        extract(paths)
    assert_right(extract(paths), cnn, paths)
