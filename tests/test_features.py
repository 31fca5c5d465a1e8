"""The cache of what a frozen CNN sees."""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import seeing_weights
from PIL import Image

import features
from features import encode_images, find_bad_images
from model import BadImageError, EncoderCNN, eval_transform

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
