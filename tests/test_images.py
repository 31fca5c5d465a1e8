"""Reading images of any kind, and the transforms."""

import numpy as np
import pytest
import torch
from PIL import Image

from images import BadImageError, eval_transform, load_image, train_transform

GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def test_grey_image(tmp_path):
    """A grey image becomes an RGB image of three equal channels."""
    image = load_image(saved(Image.fromarray(GREY), tmp_path / "grey.png"))
    np.testing.assert_array_equal(image, np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_become_white(tmp_path, mode):
    """Transparent pixels become white, and opaque ones keep their color."""
    pixels = np.zeros((2, 2, len(mode)), dtype=np.uint8)  # black,
    pixels[0, :, -1] = 255  # with an opaque upper row and a transparent lower one
    path = saved(Image.fromarray(pixels, mode=mode), tmp_path / "image.png")
    image = np.asarray(load_image(path))
    np.testing.assert_array_equal(image[0], 0)
    np.testing.assert_array_equal(image[1], 255)


def test_palette_with_transparency(tmp_path):
    """In an image with a palette, the transparent color becomes white, the others stay."""
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    path = saved(image, tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(load_image(path), [[[255, 0, 0], [255, 255, 255]]])


def test_cmyk_jpeg(tmp_path):
    """A CMYK JPEG, as used for print, keeps its colors."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = np.asarray(load_image(saved(red, tmp_path / "print.jpg"))).astype(int)
    assert np.abs(image - [255, 0, 0]).max() < 12


def test_sixteen_bits(tmp_path):
    """A PNG of 16 bits per pixel is scaled to 8 bits, not clipped."""
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = np.asarray(load_image(saved(Image.fromarray(deep), tmp_path / "deep.png")))
    np.testing.assert_allclose(image[0, :, 0], [0, 1, 128, 255], atol=1)


@pytest.mark.parametrize(
    "kind, white", [(np.int32, 65535), (np.int32, 255), (np.float32, 255), (np.float32, 1)]
)
def test_integers_and_floats(kind, white):
    """Pixels that are integers or floats keep their brightness, whatever the value of white."""
    pixels = (np.array([[0.0, 0.25, 0.5, 1.0]]) * white).astype(kind)
    image = np.asarray(load_image(Image.fromarray(pixels)))
    np.testing.assert_allclose(image[0, :, 0], [0, 64, 128, 255], atol=1)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 3)])
def test_long_and_thin_image(tmp_path, size):
    """An image so long and thin that resizing it would take gigabytes counts as unreadable."""
    with pytest.raises(BadImageError, match=f"line.png.*{size[0]} x {size[1]}"):
        load_image(saved(Image.new("RGB", size), tmp_path / "line.png"))


def test_exif_rotation(tmp_path):
    """A photo whose EXIF data says that it is rotated is rotated back."""
    pixels, exif = np.arange(24, dtype=np.uint8).reshape(2, 4, 3), Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees, clockwise
    path = saved(Image.fromarray(pixels), tmp_path / "rotated.png", exif=exif)
    np.testing.assert_array_equal(load_image(path), np.rot90(pixels, k=-1))


def test_reduced_decoding(tmp_path):
    """A large JPEG decoded with less detail has at least the requested size, and looks the same."""
    y, x = np.mgrid[:600, :800]
    waves = [np.sin(x / 30), np.cos(y / 20), np.sin((x + y) / 40)]
    large = Image.fromarray((127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))
    path = saved(large, tmp_path / "large.jpg", quality=95)
    reduced = load_image(path, min_size=200)
    assert 200 <= min(reduced.size) < 600
    full, reduced = (image.resize((64, 64)) for image in (load_image(path), reduced))
    assert np.abs(np.asarray(full, dtype=int) - np.asarray(reduced)).mean() < 2


@pytest.mark.parametrize("size", [(48, 48), (200, 90), (31, 500)])
def test_eval_transform(tmp_path, size):
    """An image of any size becomes a float tensor (3, size, size), the same every time."""
    path = saved(Image.effect_noise(size, 80), tmp_path / "noise.png")
    transform = eval_transform(64)
    image = transform(path)
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert torch.equal(image, transform(path))
    assert torch.equal(image, transform(Image.open(path)))


def test_normalization(tmp_path):
    """A pixel is scaled to 0..1, minus ImageNet's mean, divided by its standard deviation."""
    path = saved(Image.new("RGB", (10, 10), (255, 0, 51)), tmp_path / "plain.png")
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    for transform in (eval_transform(8), train_transform(8)):
        torch.testing.assert_close(transform(path).mean((1, 2)), torch.tensor(expected))


def test_train_transform_never_flips(tmp_path):
    """Training crops are random, but left stays left."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    path = saved(Image.fromarray(ramp), tmp_path / "ramp.png")
    crops = torch.stack([train_transform(32)(path) for _ in range(20)])
    assert (crops[..., -1] > crops[..., 0]).all()
    assert not torch.equal(crops[0], crops[1])
