"""Reading any image file as upright RGB, and the transforms for evaluation and training.

eval_transform(224)("photo.jpg")     # (3, 224, 224), normalized with ImageNet's statistics
centre_crop("photo.jpg", 224)        # the part of the image that it uses
"""

import errno
import os
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TO_TENSOR = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
MAX_ASPECT_RATIO = 50  # resizing a longer and thinner image would take gigabytes
MAX_JPEG_PIXELS = 300e6  # of a file that is decoded at a reduced size
TIFF_PHOTOMETRIC = 262  # the tag that says whether 0 is black (1) or white (0)
# Errors of the machine, not of the file: too many open files (of the process, of all), no memory.
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Values of white in grey images of 8, 10, 12, 14, 15 (signed) and 16 bits, and in those of floats.
WHITE = {"I": (255, 1023, 4095, 16383, 32767, 65535), "F": (1, 255)}
WHITE["I;16"] = tuple(white for white in WHITE["I"] if white != 32767)


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names the file and the reason."""


def load_image(
    source, min_size: int | None = None, max_pixels: float = MAX_JPEG_PIXELS
) -> Image.Image:
    """Open an image (path or PIL image) as upright RGB, whatever its mode.

    min_size: lets the JPEG decoder skip detail that a later resize would discard; both sides of the
        result are at least this long. Has no effect on an image that is already open.
    max_pixels: of a JPEG that is decoded at a reduced size.

    Transparent pixels become white. Grey values of more than 8 bits are scaled: see `_to_8_bits`.
    Raises BadImageError; OSError if the machine lacks memory or open files.
    """
    is_open = isinstance(source, Image.Image)
    name = source if isinstance(source, (str, Path)) else f"the {type(source).__name__} argument"
    try:
        if is_open:
            return _upright_rgb(source)
        if os.path.exists(source) and not os.path.isfile(source):
            raise ValueError("not a regular file")  # reading a pipe could wait for ever
        with open(source, "rb") as file:  # Pillow does not close the file of a damaged image
            return _upright_rgb(open_image(file, min_size, max_pixels))
    except FileNotFoundError:
        raise BadImageError(f"{name}: there is no such file; check the path") from None
    except UnidentifiedImageError:
        reason = "not an image, or damaged, or in a format that Pillow does not read"
        raise BadImageError(f"{name}: {reason}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        raise BadImageError(f"{name}: {error or type(error).__name__}") from None


def open_image(file, min_size=None, max_pixels=MAX_JPEG_PIXELS) -> Image.Image:
    """Image.open of a binary file, for a decode of at least `min_size` pixels a side.

    Pillow's limit against decompression bombs applies to the pixels that are decoded: a JPEG may
    have up to `max_pixels` if it can be decoded at a reduced size. Raises ValueError above that.
    """
    is_jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    if not is_jpeg:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    image = JpegImagePlugin.jpeg_factory(file)  # Image.open would check the size of the file
    size = image.size
    if min_size:
        image.draft("RGB", (min_size, min_size))
    # Of a progressive JPEG, the decoder keeps all coefficients, 3 to 6 bytes for each pixel.
    if "progressive" in image.info:
        max_pixels = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)
    if size[0] * size[1] > max_pixels or image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels are too many to decode (a decompression bomb?)"
        )
    return image


def _upright_rgb(image) -> Image.Image:
    white_is_zero = getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0
    image = ImageOps.exif_transpose(image)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels is too long and thin")
    if image.mode.startswith(("I", "F")):  # 16 bits or more: convert() would saturate
        image = _to_8_bits(image)
        if white_is_zero:  # Pillow inverts images of 8 bits itself
            image = ImageOps.invert(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(image) -> Image.Image:
    """Convert grey values that are integers of 16 or 32 bits, or floats, to 8 bits.

    Black is 0, and white the next of WHITE, in which files of cameras and scanners are written: a
    12-bit image in a 16-bit file has values up to 4,095. If no such white is less than four times
    the brightest value, or if values are negative, black and white are the extreme values (of
    floats, without the outermost 0.1 % at either end). NaN and infinite values become black.

    Raises ValueError if no value is finite.
    """
    values = np.asarray(image).astype(np.float64)
    known = np.abs(values) < 1e30  # False for NaN; larger values mark missing pixels
    if not known.any():
        raise ValueError("no pixel has a finite value")
    low, high = values[known].min(), values[known].max()
    whites = WHITE[image.mode if image.mode in WHITE else "I;16"]
    white = next((white for white in whites if high <= white < 4 * high), None)
    if low < 0 or white is None:
        low, white = np.percentile(values[known], (0.1, 99.9) if image.mode == "F" else (0, 100))
    else:
        low = 0
    if low == white:  # a plain image, black only if its value is not positive
        low = min(low, 0)
    scaled = np.where(known, values - low, 0) * (255 / max(white - low, 1e-30))
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def centre_crop(source, size, interpolation="bilinear") -> Image.Image:
    """Path or PIL image -> the square in its middle, with `size` pixels a side: what models see."""
    image = load_image(source, min_size=size)
    image = v2.functional.resize(image, size, v2.InterpolationMode(interpolation))
    return v2.functional.center_crop(image, size)


def eval_transform(
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear"
) -> v2.Compose:
    """Path or PIL image -> (3, image_size, image_size), float32, normalized; deterministic."""
    crop = partial(centre_crop, size=image_size, interpolation=interpolation)
    return v2.Compose([v2.Lambda(crop), *TO_TENSOR, v2.Normalize(mean, std)])


def train_transform(
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", smallest=0.7
) -> v2.Compose:
    """Same as `eval_transform`, but with a random crop, for training.

    smallest: the area of the smallest crop, as a fraction of that of the image.

    There is no horizontal flip, which would make every "left" and "right" of a caption wrong.
    """
    load = v2.Lambda(partial(load_image, min_size=image_size))
    mode = v2.InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(image_size, (smallest, 1.0), interpolation=mode)
    return v2.Compose([load, crop, *TO_TENSOR, v2.Normalize(mean, std)])


class CropTransform:
    """`train_transform` with crops down to half of the image, always the same for an image.

    The crop depends on `seed` and on the name of the file alone, so that its features can be
    computed once and cached. The other arguments are those of `train_transform`.
    """

    def __init__(self, seed, **settings):
        self.seed, self.transform = seed, train_transform(**settings, smallest=0.5)

    def __call__(self, source):
        name = Path(source).name if isinstance(source, (str, Path)) else ""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            return self.transform(source)

    def __repr__(self):
        return f"CropTransform({self.seed}, {self.transform})"


def attention_heatmap(weights, size) -> Image.Image:
    """Attention weights (H, W) as a grey image of `size` (width, height), interpolated.

    The largest weight becomes 255, and 0 stays 0.
    """
    mask = Image.fromarray((255 * weights / weights.max()).astype("uint8"))
    return mask.resize(size, Image.Resampling.BICUBIC)
