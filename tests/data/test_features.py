"""The features of a frozen CNN and their cache."""

import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import calibrated_weights, supported
from PIL import Image
from torchvision.transforms import v2

from captioning.base.distributed import resolve_precision
from captioning.base.files import fcntl
from captioning.data import features
from captioning.data.features import (
    FeatureArray,
    ReadableImages,
    extract_features,
    find_bad_images,
    fingerprint,
)
from captioning.data.images import BadImageError, eval_transform, load_image
from data_loader import identity_collate
from model import EncoderCNN

transform = eval_transform(64)


def new_encoder(encoder_class=EncoderCNN, **options):
    torch.manual_seed(0)
    options = {"weights": calibrated_weights(), "precision": "float32", **options}
    return encoder_class(16, "mobilenet_v3_small", **options)


@pytest.fixture(scope="module")
def encoder():
    return new_encoder()


@pytest.fixture
def paths(dataset):
    return sorted((dataset / "images").iterdir())


@pytest.fixture
def extract(encoder, tmp_path):
    def run(paths, encoder=encoder, transform=transform, **options):
        return extract_features(encoder, paths, transform, tmp_path, **options)

    return run


@pytest.fixture
def opened(monkeypatch):
    """The image files that are opened, in order."""
    files, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: files.append(file) or original(file))
    return files


@pytest.fixture
def small_shards(monkeypatch):
    """Five images per file: the dozen images make three files, the last one smaller."""
    monkeypatch.setattr(features, "SHARD_SIZE", 5)


def assert_right(found, encoder, paths, transform=transform):
    """The oracle: one image at a time, without a cache."""
    encoder.eval()
    with torch.no_grad():
        expected = torch.cat([encoder.forward_views(transform(p)[None]) for p in paths]).numpy()
    assert found.shape == expected.shape and found[:].dtype == np.float16
    np.testing.assert_allclose(found[:], expected, rtol=2e-3, atol=1e-3)


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("pooled", [True, False])
def test_features(paths, tmp_path, pooled):
    """The features are those of the encoder, of the image or of each position, in float16."""
    encoder = new_encoder(pooled=pooled)
    found = extract_features(encoder, paths, transform, tmp_path, batch_size=5)
    assert_right(found.features, encoder, paths)
    assert found.bad == {} and found.features.shape[2] == (1 if pooled else 4)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "densenet121"])
def test_folded_batch_norm(backbone):
    """The copy for inference has fewer BatchNorms, the encoder keeps its own; both agree."""
    torch.manual_seed(0)
    encoder = EncoderCNN(16, backbone, None, flip=True, precision="float32").eval()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:  # as after training: far from the identity
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
    folded, images = features.optimized_for_inference(encoder), torch.rand(2, 3, 64, 64)
    left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert left < len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())
    with torch.no_grad():
        expected = encoder.forward_views(images)
        error = (folded.forward_views(images) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_quantized_backbone(paths, tmp_path):
    """The features of an int8 CNN are cached, separately for other weights."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder = EncoderCNN(16, "quantized_shufflenet_v2_x0_5", None, precision="float32")
        assert_right(extract_features(encoder, paths, transform, tmp_path).features, encoder, paths)
    assert len(list(tmp_path.glob("features-*"))) == 2


@pytest.mark.parametrize("fine_tune", ["none", "last", "all"])
def test_encoder_keeps_its_mode(paths, tmp_path, fine_tune):
    """Features are computed in eval mode, and the encoder keeps the mode that it was in."""
    encoder = new_encoder(fine_tune=fine_tune).train()
    found = extract_features(encoder, paths, transform, tmp_path)
    assert encoder.training and encoder.backbone.training == (fine_tune == "all")
    assert_right(found.features, encoder, paths)


def test_worker_processes(encoder, extract, paths):
    """Worker processes give the same features; what they get and return can be pickled."""
    images = pickle.loads(pickle.dumps(ReadableImages(paths, transform)))
    assert torch.equal(images[3][0], transform(paths[3]))
    assert pickle.loads(pickle.dumps(identity_collate)) is identity_collate
    assert_right(extract(paths, num_workers=2).features, encoder, paths)


def test_feature_array(tmp_path):
    """A FeatureArray over several files is indexed like the array of all its rows."""
    size = features.SHARD_SIZE
    rows = np.random.default_rng(0).normal(size=(2 * size + 7, 1, 3)).astype(np.float16)
    files = [tmp_path / f"{start}.npy" for start in range(0, len(rows), size)]
    for number, file in enumerate(files):
        np.save(file, rows[number * size : (number + 1) * size])
    array = FeatureArray(files)
    assert len(array) == len(rows) and array.shape == rows.shape
    for index in ([size, 0, 2 * size + 6, size - 1, 0], slice(size - 2, None, 3), slice(-9, -1)):
        np.testing.assert_array_equal(array[index], rows[index])
    with pytest.raises(IndexError):
        array[[len(rows)]]


# ---------------------------------------------------------------------------- the cache


def test_second_call_opens_no_image(extract, paths, opened):
    """The second call loads the features and opens no image."""
    first = extract(paths).features[:]
    assert len(opened) == 12
    np.testing.assert_array_equal(extract(paths).features[:], first)
    assert len(opened) == 12


@pytest.mark.parametrize(
    "change", ["weights", "image", "time", "size", "order", "flip", "pooled", "precision"]
)
def test_other_input_is_computed(paths, tmp_path, opened, change):
    """Features of another encoder, precision, image size or images are not used for these."""
    encoder, size = new_encoder(), 64
    extract_features(encoder, paths, eval_transform(size), tmp_path)
    opened.clear()
    if change == "weights":
        encoder.backbone.features[0][0].weight.data[0, 0, 0, 0] += 1e-3
    if change == "image":
        Image.new("RGB", (48, 48), "red").save(paths[3])
    if change == "time":
        os.utime(paths[0], (1, 1))
    if change == "size":
        size = 80
    if change == "order":
        paths.reverse()
    if change == "flip":
        encoder.flip = True
    if change == "pooled":
        encoder = new_encoder(pooled=False)
    if change == "precision":
        encoder.precision = supported("bfloat16")
    found = extract_features(encoder, paths, eval_transform(size), tmp_path).features
    assert opened == paths
    if change != "precision":  # the oracle computes in float32
        assert_right(found, encoder, paths, eval_transform(size))


def test_precision_auto(encoder, paths):
    """The cache of precision "auto" is that of the precision it selects."""
    selected = resolve_precision("cpu", "auto")
    auto, same = (
        fingerprint(new_encoder(precision=p), paths, transform) for p in ("auto", selected)
    )
    assert auto == same
    assert (fingerprint(encoder, paths, transform) == auto) == (selected == "float32")


def grey(image, min_size):
    return load_image(image, min_size).convert("L").convert("RGB")


class Squared(EncoderCNN):
    def forward_views(self, images):
        return super().forward_views(images) ** 2


def test_custom_transform_or_encoder(extract, paths):
    """Transforms or encoders that differ only in their code never share features."""
    custom = v2.Compose([v2.Lambda(partial(grey, min_size=64)), *transform.transforms[1:]])
    assert repr(custom) == repr(transform)
    usual = extract(paths).features[:]
    for found in (extract(paths, transform=custom), extract(paths, encoder=new_encoder(Squared))):
        assert not np.allclose(found.features[:], usual, rtol=2e-3, atol=1e-3)


def test_runs_that_share_a_cache(encoder, extract, paths, opened):
    """Of two runs that need the same features at the same time, one computes them for both."""
    if fcntl is None:
        pytest.skip("this system has no file locks")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(extract, paths) for _ in range(2)]
        found = [job.result().features for job in jobs]
    assert sorted(opened) == paths
    for array in found:
        assert_right(array, encoder, paths)


# ---------------------------------------------------------------------------- several files


def test_shards(encoder, extract, paths, tmp_path, small_shards):
    """The features of more images than fit into a file are right, computed and loaded."""
    for _ in range(2):
        assert_right(extract(paths, batch_size=2).features, encoder, paths)
    assert [len(np.load(file)) for file in sorted(tmp_path.glob("*/*.npy"))] == [5, 5, 2]


def test_interruption(encoder, extract, paths, opened, monkeypatch, small_shards):
    """After an interruption, at most one file of features is computed again."""
    original, calls = features.forward_batch, []

    def forward_batch(*args):
        calls.append(args)
        if len(calls) == 6:  # after the probe: 2, 2, 1 images of the first file, 2 of the second
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(features, "forward_batch", forward_batch)
        with pytest.raises(KeyboardInterrupt):
            extract(paths, batch_size=2)
    opened.clear()
    assert_right(extract(paths, batch_size=2).features, encoder, paths)
    assert opened[:7] == paths[5:]


@pytest.mark.parametrize("damage", ["truncated", "empty", "deleted", "too short", "no array"])
def test_damaged_shard(encoder, extract, paths, tmp_path, opened, damage, small_shards):
    """A damaged or deleted file of features is computed again, and only this one."""
    extract(paths)
    file = sorted(tmp_path.glob("*/*.npy"))[1]
    content = file.read_bytes()
    replaced = {"truncated": content[:-100], "empty": b"", "no array": b"text" * 99}
    if damage == "deleted":
        file.unlink()
    elif damage == "too short":
        np.save(file, np.load(file)[:4])
    else:
        file.write_bytes(replaced[damage])
    opened.clear()
    found = extract(paths).features
    assert opened == paths[5:10]
    assert_right(found, encoder, paths)


def test_shards_of_another_rank_are_missing(encoder, extract, paths, monkeypatch, small_shards):
    """Files that another rank did not write are an error, and are computed at the next start."""
    compute = features.compute_shards
    with monkeypatch.context() as patch:
        patch.setattr(
            features, "compute_shards", lambda *args: compute(*args[:4], args[4][:-1], *args[5:])
        )
        with pytest.raises(OSError, match="00000010.npy is missing"):
            extract(paths)
    assert_right(extract(paths).features, encoder, paths)


def test_too_small_a_disk(encoder, extract, paths, tmp_path, monkeypatch, small_shards):
    """A disk without room for all missing features is an error before any image is encoded."""
    Usage = namedtuple("Usage", "total used free")
    needed = 12 * encoder.feature_size * 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed - 1))
        with pytest.raises(OSError, match="choose another --cache-dir") as caught:
            extract(paths)
        assert len(str(caught.value).splitlines()) == 1
        assert not list(tmp_path.glob("*/*.npy"))
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, needed))
        assert_right(extract(paths).features, encoder, paths)


# ---------------------------------------------------------------------------- bad images


def damage(paths):
    """Damage three images; their indices."""
    paths[2].write_bytes(b"no image")
    paths[3].unlink()
    paths[11].write_bytes(b"")
    return [2, 3, 11]


def test_bad_images(encoder, extract, paths, small_shards):
    """With `skip_bad`, all images that cannot be read are listed, and their features are zero."""
    bad = damage(paths)
    for _ in range(2):  # computed, then loaded
        found = extract(paths, batch_size=4, skip_bad=True)
        assert sorted(found.bad) == bad
        assert all(str(paths[index]) in reason for index, reason in found.bad.items())
        assert not found.features[bad].any()
        good = sorted({*range(12)} - {*bad})
        assert_right(found.features[good], encoder, [paths[index] for index in good])


def test_bad_images_are_an_error(extract, paths, small_shards):
    """Without `skip_bad`, an error names all images that cannot be read, and no other."""
    bad = damage(paths)
    with pytest.raises(BadImageError) as caught:
        extract(paths)
    for index, path in enumerate(paths):
        assert (str(path) in str(caught.value)) == (index in bad)


@pytest.mark.parametrize("skip_bad", [True, False])
def test_image_that_recovers(encoder, extract, paths, monkeypatch, skip_bad):
    """An image that was temporarily unreadable is encoded by the next call that can read it."""
    original, failing = Image.open, [paths[5]]

    def fail_once(file):
        if file in failing:
            failing.remove(file)
            raise OSError("the network is down")
        return original(file)

    monkeypatch.setattr(Image, "open", fail_once)
    if skip_bad:
        assert list(extract(paths, skip_bad=True).bad) == [5]
    else:
        with pytest.raises(BadImageError, match=f"{paths[5].name}: the network is down"):
            extract(paths)
    found = extract(paths)
    assert found.bad == {}
    assert_right(found.features, encoder, paths)


def test_no_good_image(extract, paths):
    """If no image can be read, all of them are listed."""
    for path in paths:
        path.write_bytes(b"no image")
    assert sorted(extract(paths, skip_bad=True).bad) == list(range(12))


def test_find_bad_images(paths):
    """`find_bad_images` lists the images that cannot be read, and no other."""
    bad = damage(paths)
    found = find_bad_images(paths, transform)
    assert sorted(found) == bad and "there is no such file" in found[3]
