"""The cache of what a frozen CNN sees."""

import os
import pickle
import platform
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import seeing_weights
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import features
from features import encode_images, find_bad_images, keep_freed_memory
from model import BadImageError, EncoderCNN, eval_transform, load_image

transform = eval_transform(64)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return EncoderCNN(16, "mobilenet_v3_small", weights=seeing_weights())


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Some processors would compute in bfloat16, and the oracle does not."""
    monkeypatch.setattr(features, "fast_precision", lambda device: nullcontext())


@pytest.fixture
def paths(dataset):
    return sorted((dataset / "images").iterdir())


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, one entry each time."""
    files, opened = [], Image.open

    def count(source):
        files.append(source)
        return opened(source)

    monkeypatch.setattr(Image, "open", count)
    return files


def directly(encoder, paths):
    """The oracle: one image at a time, without a cache."""
    encoder.eval()
    with torch.no_grad():
        return torch.cat([encoder.pool(transform(path)[None]) for path in paths]).numpy()


def test_cached_features(encoder, paths, tmp_path):
    """A row is the pooled features of its image, in half precision."""
    found = encode_images(encoder, paths, transform, tmp_path, batch_size=5)
    assert found.rows.dtype == np.float16 and found.bad == {}
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "densenet121"])
def test_folded_batch_norm(backbone):
    """A copy without BatchNorms sees the same, and the encoder itself keeps its own."""
    torch.manual_seed(0)
    encoder = EncoderCNN(16, backbone, weights=None, mirror=True).eval()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:  # as after training: far from doing nothing
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
    images = torch.rand(2, 3, 64, 64)
    folded = features.without_batch_norm(encoder)
    left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert left < len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())
    with torch.no_grad():
        expected = encoder.pool(images)
        error = (folded.pool(images) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_features_of_a_quantized_backbone(paths, tmp_path):
    """The features of a CNN in int8 are kept like all others, and told from those of another."""
    files = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder = EncoderCNN(16, "quantized_shufflenet_v2_x0_5", weights=None)
        rows = encode_images(encoder, paths, transform, tmp_path).rows
        np.testing.assert_allclose(rows, directly(encoder, paths), rtol=1e-3, atol=1e-4)
        files = files | set(tmp_path.glob("*.json"))
    assert len(files) == 2


def test_workers_can_be_sent_their_work(encoder, paths, tmp_path, monkeypatch):
    """Where a worker begins as a new program, as on macOS and Windows, its work is pickled."""

    def loader(dataset, batch_size, num_workers, collate_fn):
        assert num_workers == 2
        return DataLoader(*pickle.loads(pickle.dumps((dataset, batch_size))),
                          collate_fn=pickle.loads(pickle.dumps(collate_fn)))  # fmt: skip

    monkeypatch.setattr(features, "DataLoader", loader)
    found = encode_images(encoder, paths, transform, tmp_path, workers=2)
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


def test_rows_are_written_alone(tmp_path):
    """Writing some rows leaves the bytes of all others as they are."""
    rows = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    features.write_rows(tmp_path / "rows.npy", [7, 2], 2 * rows[[7, 2]])
    rows[[7, 2]] *= 2
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), rows)


def test_features_that_never_arrived(encoder, paths, tmp_path, monkeypatch):
    """If another process's features are not in the file, that is an error and not a row of zeros.

    The file is not declared complete either: the next start encodes what is missing.
    """
    encode_rows = features.encode_rows
    with monkeypatch.context() as patch:
        patch.setattr(features, "encode_rows", lambda e, p, t, todo, *rest: encode_rows(
            e, p, t, todo[:-3], *rest))  # fmt: skip
        with pytest.raises(OSError, match="3 features are missing"):
            encode_images(encoder, paths, transform, tmp_path)
    found = encode_images(encoder, paths, transform, tmp_path)
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


def grey(image, min_size):
    return load_image(image, min_size).convert("L").convert("RGB")


class Squared(EncoderCNN):
    def pool(self, images):
        return super().pool(images) ** 2


def test_own_transform_or_encoder(encoder, paths, tmp_path):
    """A transform or encoder of one's own never gets another's features, alike as they look."""
    own = v2.Compose([v2.Lambda(partial(grey, min_size=64)), *transform.transforms[1:]])
    assert repr(own) == repr(transform)
    torch.manual_seed(0)
    squared = Squared(16, "mobilenet_v3_small", weights=seeing_weights())
    usual = encode_images(encoder, paths, transform, tmp_path).rows
    for found in (
        encode_images(encoder, paths, own, tmp_path).rows,
        encode_images(squared, paths, transform, tmp_path).rows,
    ):
        assert not np.allclose(found, usual, rtol=2e-3, atol=1e-3)


def test_encoder_keeps_its_mode(paths, tmp_path):
    """Encoding happens in eval mode, and leaves a fine-tuned encoder in the mode it was in."""
    torch.manual_seed(0)
    encoder = EncoderCNN(16, "mobilenet_v3_small", seeing_weights(), fine_tune=True).train()
    found = encode_images(encoder, paths, transform, tmp_path)
    assert encoder.training and encoder.backbone.training
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


def test_second_call_encodes_nothing(encoder, paths, tmp_path, decoded):
    """The second time the features come from the file: no image is even opened."""
    first = encode_images(encoder, paths, transform, tmp_path)
    assert len(decoded) == 12
    second = encode_images(encoder, paths, transform, tmp_path)
    assert len(decoded) == 12
    np.testing.assert_array_equal(first.rows, second.rows)


@pytest.mark.parametrize("changed", ["weights", "image", "size", "order", "mirror"])
def test_other_input_is_encoded_anew(paths, tmp_path, decoded, changed):
    """Features of other weights, images or another image size are never taken for these."""
    torch.manual_seed(0)
    encoder, size = EncoderCNN(16, "mobilenet_v3_small", seeing_weights()), 64
    encode_images(encoder, paths, eval_transform(size), tmp_path)
    decoded.clear()
    if changed == "weights":
        encoder.backbone.features[0][0].weight.data[0, 0, 0, 0] += 1e-3
    if changed == "image":
        Image.new("RGB", (48, 48), "red").save(paths[3])
    if changed == "size":
        size = 80
    if changed == "order":
        paths.reverse()
    if changed == "mirror":
        encoder.mirror = True
    found = encode_images(encoder, paths, eval_transform(size), tmp_path)
    assert decoded == paths
    with torch.no_grad():
        expected = encoder.pool(torch.stack([eval_transform(size)(path) for path in paths]))
    np.testing.assert_allclose(found.rows, expected.numpy(), rtol=2e-3, atol=1e-3)


def test_image_of_the_same_size_and_another_time(encoder, paths, tmp_path, decoded):
    """An image rewritten later counts as changed even if its size is the same."""
    encode_images(encoder, paths, transform, tmp_path)
    decoded.clear()
    os.utime(paths[0], (1, 1))
    encode_images(encoder, paths, transform, tmp_path)
    assert decoded == paths


def test_interruption(encoder, paths, tmp_path, decoded, monkeypatch):
    """Interrupted, encoding goes on from its last note, and ends with the same features."""
    monkeypatch.setattr(features, "SAVE_EVERY", 4)
    calm_pool, calls = encoder.pool, []

    def pool(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return calm_pool(images)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "pool", pool)
        with pytest.raises(KeyboardInterrupt):
            encode_images(encoder, paths, transform, tmp_path, batch_size=2)
    decoded.clear()
    found = encode_images(encoder, paths, transform, tmp_path, batch_size=2)
    assert decoded == paths[4:]  # 6 were encoded, 4 were noted
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("damage", ["a byte", "cut off", "gone"])
def test_damaged_file(encoder, paths, tmp_path, damage, capsys):
    """Features whose file was damaged are computed anew, and are right."""
    encode_images(encoder, paths, transform, tmp_path)
    (file,) = (path for path in tmp_path.glob("*.npy") if "state" not in path.name)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "a byte" else content[:-100])
    found = encode_images(encoder, paths, transform, tmp_path)
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


def test_bad_images(encoder, paths, tmp_path):
    """Images that cannot be read are listed, all of them, and their rows are zero."""
    paths[2].write_bytes(b"no image")
    paths[3].unlink()
    paths[11].write_bytes(b"")
    for _ in range(2):  # computed, then from the file
        found = encode_images(encoder, paths, transform, tmp_path, batch_size=4, skip_bad=True)
        assert sorted(found.bad) == [2, 3, 11]
        assert all(str(paths[row]) in why for row, why in found.bad.items())
        assert not found.rows[[2, 3, 11]].any()
        good = [path for row, path in enumerate(paths) if row not in found.bad]
        np.testing.assert_allclose(
            np.delete(found.rows, [2, 3, 11], axis=0), directly(encoder, good), rtol=2e-3, atol=1e-3
        )


def test_image_that_recovers(encoder, paths, tmp_path, monkeypatch):
    """An image that could not be read for a while is encoded as soon as it can be."""
    opened = Image.open

    def fail(source):
        if source == paths[5]:
            raise OSError("the network is down")
        return opened(source)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        found = encode_images(encoder, paths, transform, tmp_path, skip_bad=True)
        assert list(found.bad) == [5]
    found = encode_images(encoder, paths, transform, tmp_path)
    assert found.bad == {}
    np.testing.assert_allclose(found.rows, directly(encoder, paths), rtol=2e-3, atol=1e-3)


@pytest.mark.skipif(platform.system() == "Windows", reason="there are no such locks")
def test_runs_that_share_a_cache(encoder, paths, decoded, tmp_path):
    """Of two runs that want the same features at the same time, one computes them for both."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(encode_images, encoder, paths, transform, tmp_path) for _ in "12"]
        one, other = (job.result() for job in jobs)
    assert sorted(decoded) == paths
    np.testing.assert_array_equal(one.rows, other.rows)


def test_image_that_recovers_at_once(encoder, paths, tmp_path, monkeypatch):
    """An image that failed and can be read a moment later is named all the same: it is missing."""
    opened, failures = Image.open, [paths[5]]

    def fail(source):
        if source in failures:
            failures.remove(source)
            raise OSError("the network is down")
        return opened(source)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImageError, match=f"{paths[5].name}.*start again"):
        encode_images(encoder, paths, transform, tmp_path)
    assert encode_images(encoder, paths, transform, tmp_path).bad == {}


def test_bad_images_stop_the_caller(encoder, paths, tmp_path):
    """Without `skip_bad`, unreadable images are an error that names all of them."""
    paths[2].write_bytes(b"no image")
    paths[3].unlink()
    with pytest.raises(BadImageError) as caught:
        encode_images(encoder, paths, transform, tmp_path)
    for row, path in enumerate(paths):
        assert (str(path) in str(caught.value)) == (row in (2, 3))


def test_no_good_image(encoder, paths, tmp_path):
    """Even if no image can be read, that is a list of reasons and not a crash."""
    for path in paths:
        path.write_bytes(b"no image")
    found = encode_images(encoder, paths, transform, tmp_path, skip_bad=True)
    assert sorted(found.bad) == list(range(12))


def test_find_bad_images(paths):
    """Looking for unreadable images finds them all, and only them."""
    paths[2].write_bytes(b"no image")
    paths[3].unlink()
    found = find_bad_images(paths, transform)
    assert sorted(found) == [2, 3]
    assert "there is no such file" in found[3]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept():
    """A large tensor costs new pages from the system a few times, and then takes the freed ones."""
    resource = pytest.importorskip("resource")
    pages = []
    with keep_freed_memory():
        for _ in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)  # 64 MB, 16,384 pages
            pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(pages) < 100
