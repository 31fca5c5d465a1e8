"""Captions files in COCO's format: reading, validating, writing.

data = CocoCaptions("train2017", "annotations/captions_train2017.json")
data.paths[0], data.captions[0]            # an image and its five captions

Custom datasets use the same format: a folder of images, and a JSON file with their captions.
"""

import contextlib
import copy
import io
import json
import os
from pathlib import Path

from pycocotools.coco import COCO

from captioning.base.files import write_text


class DataError(ValueError):
    """Captions that cannot be used; the message names the file, the reason and a remedy."""


class CocoCaptions:
    """The images of one split and all their captions, sorted by image id.

    image_ids: COCO's ids.
    paths: the image files.
    captions: a list of captions per image.
    indices: positions 0..N-1 in the complete split, which `without` keeps; they index features.
    uncaptioned: file names of the listed images that have no caption and are left out.
    description: that in the "info" of the captions file, on one line, or else the file's name.
    """

    def __init__(self, image_dir, captions_file):
        """Read a captions file in COCO's format. Raises DataError if anything is wrong with it."""
        self.image_dir, self.captions_file = Path(image_dir), Path(captions_file)
        if not self.image_dir.is_dir():
            raise DataError(f"there is no image folder {image_dir}; check the path")
        coco = read_captions(captions_file)
        self.description = _description(coco.dataset.get("info")) or self.captions_file.name
        self.image_ids, self.paths, self.captions, self.uncaptioned = [], [], [], []
        for image_id in sorted(coco.getImgIds()):
            name = coco.imgs[image_id]["file_name"]
            captions = [annotation["caption"] for annotation in coco.imgToAnns.get(image_id, [])]
            if captions:
                self.image_ids.append(image_id)
                self.paths.append(_safe_join(self.image_dir, name, captions_file))
                self.captions.append(captions)
            else:
                self.uncaptioned.append(name)
        if not self.paths:
            raise DataError(f"{captions_file} has no image with a caption")
        self.indices = list(range(len(self.paths)))

    def __len__(self):
        return len(self.paths)

    @property
    def all_captions(self) -> list[str]:
        """The captions of all images as one list, image by image."""
        return [caption for captions in self.captions for caption in captions]

    def without(self, indices) -> "CocoCaptions":
        """A copy without the images whose entry of `self.indices` is in `indices`."""
        kept = [row for row, index in enumerate(self.indices) if index not in indices]
        smaller = copy.copy(self)
        for name in ("image_ids", "paths", "captions", "indices"):
            setattr(smaller, name, [getattr(self, name)[row] for row in kept])
        return smaller


def read_captions(captions_file) -> COCO:
    """Read and validate a captions file with COCO's own API, without its messages.

    Raises DataError.
    """
    path = Path(captions_file)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"there is no captions file {path}; check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({error}); is it the right file, and complete?"
        ) from None
    problem = _find_problem(content)
    if problem:
        raise DataError(f"{path}: {problem}")
    coco = COCO()
    coco.dataset = {key: value for key, value in content.items() if key != "categories"}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _description(info) -> str:
    text = info.get("description") if isinstance(info, dict) else None
    return " ".join(text.split())[:100] if isinstance(text, str) else ""


def write_captions(path, images, annotations, description):
    """Write a captions file in COCO's format. Raises OSError."""
    content = {"info": {"description": description}, "licenses": []}
    content |= {"images": images, "annotations": annotations}
    write_text(path, json.dumps(content))


# ---------------------------------------------------------------------------- validation


def _find_problem(content) -> str | None:
    """The first problem of a captions file's content, as a sentence; None if it is valid."""
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return f"there is no list {key!r}; a captions file has 'images' and 'annotations'"
    ids = set()
    for image in content["images"]:
        problem = _problem_of_image(image, ids)
        if problem:
            return problem
        ids.add(image["id"])
    if len({type(image_id) for image_id in ids}) > 1:
        return "some image ids are numbers and some are text; make them one kind"
    problems = []
    for number, annotation in enumerate(content["annotations"]):
        problem = _problem_of_annotation(annotation, number, ids)
        if problem:
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        return "; ".join(problems[:3]) + more + "; correct or remove these entries"
    return None


def _problem_of_image(image, ids) -> str | None:
    if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
        return f"every entry of 'images' needs an id, {_shorten(image)} has none"
    if not _is_text(image.get("file_name")):
        return f"image {_shorten(image['id'])} has no file_name"
    if image["id"] in ids:
        return f"image id {_shorten(image['id'])} is listed twice"
    return None


def _problem_of_annotation(annotation, number, ids) -> str | None:
    """The problem of an annotation, or None; a missing annotation id is set to `number`."""
    if not isinstance(annotation, dict):
        return f"annotation number {number} is not an object"
    name = f"annotation {_shorten(annotation.setdefault('id', number))}"
    image_id, caption = annotation.get("image_id"), annotation.get("caption")
    if not isinstance(annotation["id"], (int, str)):
        return f"annotation number {number} has an id that is neither a number nor text"
    if caption == "" or (_is_text(caption) and not caption.strip()):
        return f"{name} has an empty caption"
    if not _is_text(caption):
        return f"{name} has no caption text"
    if not isinstance(image_id, (int, str)):
        return f"{name} has no image_id"
    if image_id not in ids:
        return f"{name} refers to image {_shorten(image_id)}, which 'images' does not list"
    return None


def _is_text(value) -> bool:
    """A non-empty string that can be encoded, unlike an unpaired surrogate."""
    with contextlib.suppress(UnicodeEncodeError):
        return isinstance(value, str) and bool(value.encode())
    return False


def _shorten(value) -> str:
    return str(value)[:60]


def _safe_join(folder: Path, name: str, captions_file) -> Path:
    """`folder / name`, refused if it leads out of the folder in any way, including links."""
    path = folder / name
    plain = "/" not in name and "\\" not in name and "\0" not in name and name not in (".", "..")
    if plain and not path.is_symlink():
        return path
    root = os.path.realpath(folder)
    with contextlib.suppress(ValueError):  # "\0" in a name
        if "\\" not in name and os.path.realpath(path).startswith(root + os.sep):
            return path
    raise DataError(
        f"{captions_file}: file_name {_shorten(name)!r} leads outside {folder}; correct it"
    )
