"""Reading any image file as upright RGB, and the transforms for evaluation and training.

eval_transform(224)("photo.jpg")     # (3, 224, 224), normalized with ImageNet's statistics
centre_crop("photo.jpg", 224)        # the part of the image that it uses
"""

import os
import warnings
import zlib
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TO_TENSOR = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
MAX_ASPECT_RATIO = 50  # resizing a longer and thinner image would take gigabytes


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names the file and the reason."""


def load_image(source, min_size: int | None = None) -> Image.Image:
    """Open an image (path or PIL image) as upright RGB, whatever its mode.

    min_size: lets the JPEG decoder skip detail that a later resize would discard; both sides of the
        result are at least this long. Has no effect on an image that is already open.

    Transparent pixels become white. Raises BadImageError.
    """
    is_open = isinstance(source, Image.Image)
    name = source if isinstance(source, (str, Path)) else f"the {type(source).__name__} argument"
    try:
        if is_open:
            return _upright_rgb(source)
        if os.path.exists(source) and not os.path.isfile(source):
            raise ValueError("not a regular file")  # reading a pipe could wait for ever
        with open(source, "rb") as file:  # Pillow does not close the file of a damaged image
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file)
            if min_size:
                image.draft("RGB", (min_size, min_size))
            return _upright_rgb(image)
    except FileNotFoundError:
        raise BadImageError(f"{name}: there is no such file; check the path") from None
    except UnidentifiedImageError:
        reason = "not an image, or damaged, or in a format that Pillow does not read"
        raise BadImageError(f"{name}: {reason}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise BadImageError(f"{name}: {error or type(error).__name__}") from None


def _upright_rgb(image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels is too long and thin")
    if image.mode.startswith(("I", "F")):  # 16 bits or more: convert() would saturate
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(image) -> Image.Image:
    """Convert an image of integers or floats in 0..65535, 0..255 or 0..1 to 8-bit grey."""
    largest = image.getextrema()[1]
    scale = 1 / 256 if largest > 255 or image.mode.startswith("I;16") else 1
    if image.mode == "F" and largest <= 1:
        scale = 255
    return image.point(lambda value: value * scale).convert("L")


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


def attention_mask(weights, size) -> Image.Image:
    """Attention weights (H, W) as a grey image of `size` (width, height), interpolated.

    The largest weight becomes 255, and 0 stays 0.
    """
    mask = Image.fromarray((255 * weights / weights.max()).astype("uint8"))
    return mask.resize(size, Image.Resampling.BICUBIC)
