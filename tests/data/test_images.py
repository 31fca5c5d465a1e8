"""Reading images of any kind, and the transforms."""

import errno
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data import images
from captioning.data.images import (
    BadImageError,
    CropTransform,
    attention_heatmap,
    centre_crop,
    eval_transform,
    load_image,
    train_transform,
)


def saved(image, path, **options):
    image.save(path, **options)
    return path


def array(values, dtype, mode=None):
    return Image.fromarray(np.array(values, dtype=dtype), mode=mode)


def with_palette(image):
    """Index 0 is red, index 1 is blue and transparent."""
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 1
    return image


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize(
    "image, suffix, expected",
    [
        (lambda: array([[0, 99, 255]], np.uint8), "png", [[0] * 3, [99] * 3, [255] * 3]),
        (lambda: array([[[0, 255], [0, 0]]], np.uint8, "LA"), "png", [[0] * 3, [255] * 3]),
        (lambda: array([[[0, 9, 0, 255], [0] * 4]], np.uint8), "png", [[0, 9, 0], [255] * 3]),
        (lambda: with_palette(array([[0, 1]], np.uint8, "P")), "png", [[255, 0, 0], [255] * 3]),
        (lambda: Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "jpg", [[254, 0, 0]]),
        (
            lambda: array([[0, 257, 32768, 65535]], np.uint16),
            "png",
            [[0] * 3, [1] * 3, [128] * 3, [255] * 3],
        ),
    ],
    ids=["grey", "grey and alpha", "RGBA", "palette", "CMYK", "16 bits"],
)
def test_files_of_any_mode(tmp_path, image, suffix, expected):
    """Any file becomes RGB: transparent pixels white, 16 bits scaled and not clipped."""
    image = load_image(saved(image(), tmp_path / f"image.{suffix}"))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[0], expected, atol=0 if suffix == "png" else 1)


RAMP = np.linspace(0, 1, 2048).reshape(32, 64)


def tiff(values, big_endian=False, photometric=1):
    """A TIFF file with one sample per pixel, of the type of `values`, as bytes."""
    order, kind = "<>"[big_endian], values.dtype.kind
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: values.shape[1], 257: values.shape[0], 258: 8 * values.itemsize, 259: 1}
    tags |= {262: photometric}
    tags |= {273: 8, 277: 1, 278: values.shape[0], 279: len(data), 339: " uif".index(kind)}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, x) for tag, x in tags.items())
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    mark = b"MM" if big_endian else b"II"
    return mark + struct.pack(order + "HI", 42, 8 + len(data)) + data + directory


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    "dtype, low, high",
    [
        ("u2", 0, 65535),
        ("u2", 0, 4095),  # 12 bits
        ("u2", 0, 1023),
        ("i2", 0, 32767),
        ("i2", -32768, 32767),
        ("i4", 0, 255),
        ("i4", 0, 65535),
        ("i4", -100, 17_850_000),
        ("f4", 0, 1),
        ("f4", 0, 255),
        ("f4", 0, 1000),
        ("f4", -1, 1),
        ("f4", 280, 310),
        ("f4", 0, 1e-6),
    ],
)
def test_grey_values_of_any_range(tmp_path, dtype, low, high, big_endian):
    """A ramp from black to white is that, whatever the type and range of its values."""
    values = (low + RAMP * (high - low)).astype(dtype)
    (tmp_path / "ramp.tif").write_bytes(tiff(values, big_endian))
    image = np.asarray(load_image(tmp_path / "ramp.tif"))
    np.testing.assert_allclose(image[..., 0], 255 * RAMP, atol=2)


@pytest.mark.parametrize("dtype, white", [("u1", 255), ("u2", 65535), ("f4", 1)])
def test_white_is_zero(tmp_path, dtype, white):
    """In a TIFF that says that 0 is white, 0 is white."""
    (tmp_path / "ramp.tif").write_bytes(tiff((RAMP * white).astype(dtype), photometric=0))
    image = np.asarray(load_image(tmp_path / "ramp.tif"))
    np.testing.assert_allclose(image[..., 0], 255 * (1 - RAMP), atol=2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4e38])
def test_missing_values(tmp_path, value):
    """Values that are not finite, or mark missing pixels, are black and change no other pixel."""
    values = RAMP.astype(np.float32)
    values[10:20] = value
    (tmp_path / "ramp.tif").write_bytes(tiff(values))
    image = np.asarray(load_image(tmp_path / "ramp.tif"))[..., 0]
    np.testing.assert_allclose(np.delete(image, slice(10, 20), 0)[0], 255 * RAMP[0], atol=1)
    assert (image[10:20] == 0).all()


def test_a_few_extreme_floats(tmp_path):
    """Single pixels far brighter than the others do not make the picture black."""
    values = (1000 * RAMP).astype(np.float32)
    values[0, 0] = 1e9
    (tmp_path / "ramp.tif").write_bytes(tiff(values))
    image = np.asarray(load_image(tmp_path / "ramp.tif"))[..., 0]
    np.testing.assert_allclose(image[1:], 255 * RAMP[1:], atol=2)


def test_no_finite_value(tmp_path):
    """An image without a finite value is unreadable."""
    (tmp_path / "nan.tif").write_bytes(tiff(np.full((8, 8), np.nan, np.float32)))
    with pytest.raises(BadImageError, match="nan.tif: no pixel has a finite value"):
        load_image(tmp_path / "nan.tif")


@pytest.mark.parametrize("value, expected", [(0, 0), (500.0, 255), (-3.0, 0)])
def test_plain_image_of_floats(value, expected):
    """A plain image is black only if its value is not positive."""
    image = load_image(Image.fromarray(np.full((4, 4), value, np.float32)))
    assert np.unique(image).tolist() == [expected]


def test_large_jpeg(tmp_path, monkeypatch):
    """The limit of pixels applies to what is decoded: not to a JPEG that is reduced, but to a
    whole one, to other formats, and to a JPEG of more than 300 megapixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 480 - 1)
    photo = Image.linear_gradient("L").resize((640, 480))
    for name in ("grey.jpg", "large.png"):
        photo.save(tmp_path / name)
    photo.convert("RGB").save(tmp_path / "large.jpg")
    for name in ("grey.jpg", "large.jpg"):
        assert min(load_image(tmp_path / name, min_size=100).size) >= 100
        with pytest.raises(BadImageError, match=f"{name}.*640 x 480 pixels are too many"):
            load_image(tmp_path / name)
    with pytest.raises(BadImageError, match="large.png.*bomb"):
        load_image(tmp_path / "large.png", min_size=100)
    with pytest.raises(BadImageError, match="large.jpg.*640 x 480 pixels are too many"):
        load_image(tmp_path / "large.jpg", min_size=100, max_pixels=640 * 480 - 1)


def test_progressive_jpeg(tmp_path, monkeypatch):
    """Of a progressive JPEG all coefficients are decoded: it may have twice Pillow's limit."""
    Image.new("RGB", (640, 480)).save(tmp_path / "large.jpg", progressive=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 240)
    assert load_image(tmp_path / "large.jpg", min_size=100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 240 - 1)
    with pytest.raises(BadImageError, match="too many"):
        load_image(tmp_path / "large.jpg", min_size=100)


def test_too_many_open_files(tmp_path, monkeypatch):
    """An error of the machine does not make an image unreadable."""

    def refused(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(images, "open_image", refused)
    with pytest.raises(OSError, match="Too many open files"):
        load_image(saved(Image.new("RGB", (8, 8)), tmp_path / "image.png"))


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 3)])
def test_long_and_thin_image(tmp_path, size):
    """An image too long and thin to be resized without gigabytes of memory is unreadable."""
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


@pytest.mark.parametrize("width, height", [(100, 40), (40, 100), (40, 40)])
def test_centre_crop(tmp_path, width, height):
    """The crop is the square in the middle of the image, enlarged; `eval_transform` uses it, of a
    file or an image."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8))
    left, top = (width - 40) // 2, (height - 40) // 2
    crop = centre_crop(image, 80)
    expected = np.asarray(image)[top : top + 40, left : left + 40].repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(np.asarray(crop, dtype=int), expected, atol=1)
    transform = eval_transform(80, mean=(0, 0, 0), std=(1, 1, 1))
    for source in (image, saved(image, tmp_path / "image.png")):
        transformed = transform(source)
        assert transformed.dtype == torch.float32
        np.testing.assert_allclose(255 * transformed.permute(1, 2, 0), crop, atol=1e-3)


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
    assert any(not torch.equal(crops[0], crop) for crop in crops)


def test_crop_transform(tmp_path):
    """A crop depends on the seed and the file's name alone, and no random numbers are consumed."""
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    paths = [saved(Image.fromarray(ramp), tmp_path / f"{i}.png") for i in range(20)]
    state = torch.get_rng_state()
    crops = torch.stack([CropTransform(0, image_size=32)(path) for path in paths])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = torch.stack([CropTransform(0, image_size=32)(path) for path in reversed(paths)])
    assert torch.equal(again.flip(0), crops)
    other = torch.stack([CropTransform(1, image_size=32)(path) for path in paths])
    contents = {crop.numpy().tobytes() for crop in torch.cat([crops, other])}
    assert len(contents) == 40


def test_crop_transform_shows_half_of_the_image(tmp_path):
    """A crop has at least half of the area of the image, and sides in a ratio of 3:4 to 4:3."""
    rows, columns = np.mgrid[:240, :240].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1))
    for number in range(30):
        path = saved(image, tmp_path / f"{number}.png")
        crop = CropTransform(0, image_size=60, mean=(0, 0, 0), std=(1, 1, 1))(path) * 255
        height = (crop[0, -1].mean() - crop[0, 0].mean()).item() * 60 / 59
        width = (crop[1, :, -1].mean() - crop[1, :, 0].mean()).item() * 60 / 59
        assert 0.48 < height * width / 240**2 <= 1.02 and 0.73 < width / height < 1.37


def test_attention_heatmap():
    """The largest weight is white, 0 is black, and weights are not mirrored or transposed."""
    weights = np.array([[0.0, 0.2, 0.1], [0.4, 0.1, 0.0]])
    mask = attention_heatmap(weights, (3, 2))
    np.testing.assert_allclose(np.array(mask), 255 * weights / 0.4, atol=1)
    assert attention_heatmap(weights, (30, 20)).size == (30, 20)
