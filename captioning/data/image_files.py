"""Folders of images, and files of captions for them in COCO's results format."""

import json
import os
import re
from pathlib import Path

from captioning.base.files import write_text
from captioning.data.coco import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_images(folder) -> list[Path]:
    """The image files in a folder and its subfolders, sorted, but no hidden ones.

    Raises DataError if there is none.
    """
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(f"there is no image in {folder}; check the path")
    return paths


def image_id_of(path) -> int | str:
    """COCO_val2014_000000000042.jpg, 000000000042.jpg -> 42; holiday.jpg -> "holiday.jpg"."""
    digits = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", path.stem)
    return int(digits[1]) if digits else path.name


def check_results_path(path):
    """Raise OSError if no file can be written there, before the captions are generated."""
    folder = Path(path).parent
    if os.path.isdir(path):
        raise OSError(f"cannot write {path}: it is a folder; give the path of a file")
    if not folder.is_dir():
        raise OSError(f"cannot write {path}: there is no folder {folder}; create it first")


def write_results(path, image_ids, captions):
    """COCO's results format. Raises OSError if the file cannot be written."""
    results = [{"image_id": i, "caption": c} for i, c in zip(image_ids, captions, strict=True)]
    write_text(path, json.dumps(results))
