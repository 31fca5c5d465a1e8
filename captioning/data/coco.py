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
    sources: the "source" of each image in the captions file, such as "coco"; "" if it has none.
        Images of several sources are scored apart.
    uncaptioned: file names of the listed images that have no caption and are left out.
    description: that in the "info" of the captions file, on one line, or else the file's name.
    """

    def __init__(self, image_dir, captions_file):
        """Read a captions file in COCO's format. Raises DataError if anything is wrong with it."""
        self.captions_file = Path(captions_file)
        if not os.path.isdir(image_dir):
            raise DataError(f"there is no image folder {image_dir}; check the path")
        coco = read_captions(captions_file)
        self.description = _description(coco.dataset.get("info")) or self.captions_file.name
        self.image_ids, self.paths, self.captions, self.sources = [], [], [], []
        self.uncaptioned = []
        root = os.path.realpath(image_dir)
        for image_id in sorted(coco.getImgIds()):
            name = coco.imgs[image_id]["file_name"]
            captions = [annotation["caption"] for annotation in coco.imgToAnns.get(image_id, [])]
            if not captions:
                self.uncaptioned.append(name)
                continue
            if not _is_below(root, name):
                problem = f"file_name {_shorten(name)!r} leads outside {image_dir}; correct it"
                raise DataError(f"{captions_file}: {problem}")
            self.image_ids.append(image_id)
            self.paths.append(Path(image_dir, name))
            self.captions.append(captions)
            self.sources.append(str(coco.imgs[image_id].get("source", "")))
        if not self.paths:
            raise DataError(f"{captions_file} has no image with a caption")

    def __len__(self):
        return len(self.paths)

    @property
    def all_captions(self) -> list[str]:
        """The captions of all images as one list, image by image."""
        return [caption for captions in self.captions for caption in captions]

    def without(self, rows) -> "CocoCaptions":
        """A copy in which the images with these row numbers are left out."""
        smaller = copy.copy(self)
        for name in ("image_ids", "paths", "captions", "sources"):
            kept = [value for row, value in enumerate(getattr(self, name)) if row not in rows]
            setattr(smaller, name, kept)
        return smaller


def read_captions(captions_file) -> COCO:
    """Read and validate a captions file with COCO's own API, without its messages.

    Raises DataError.
    """
    path = Path(captions_file)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        problem = f"{path} is not JSON ({error}); is it the right file, and complete?"
        raise DataError(problem) from error
    problems = list(_problems(content))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        problem = "; ".join(problems[:3]) + more
        raise DataError(f"{path}: {problem}; correct or remove these entries")
    coco = COCO()
    # COCO's API would look for a category in every annotation; captions have none.
    coco.dataset = {key: value for key, value in content.items() if key != "categories"}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def write_captions(path, images, annotations, description):
    """Write a captions file in COCO's format. Raises OSError."""
    content = {"info": {"description": description}, "licenses": []}
    content |= {"images": images, "annotations": annotations}
    write_text(path, json.dumps(content))


# ---------------------------------------------------------------------------- validation


def _problems(content):
    """Yield what is wrong with a captions file; annotations without an id get one."""
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            yield f"there is no list {key!r}; a captions file has 'images' and 'annotations'"
            return
    ids = set()
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            yield f"image number {number} has no id"
            continue
        if not image.get("file_name") or not _is_text(image["file_name"]):
            yield f"image {_shorten(image['id'])} has no file_name"
        if image["id"] in ids:
            yield f"image id {_shorten(image['id'])} is listed twice"
        ids.add(image["id"])
    if len({type(image_id) for image_id in ids}) > 1:
        yield "some image ids are numbers and some are text, make them one kind"
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            yield f"annotation number {number} is not an object"
        elif not isinstance(annotation.setdefault("id", number), (int, str)):
            yield f"annotation number {number} has an id that is neither a number nor text"
        elif not _is_text(annotation.get("caption")):
            yield f"annotation {_shorten(annotation['id'])} has no caption text"
        elif not annotation["caption"].strip():
            yield f"annotation {_shorten(annotation['id'])} has an empty caption"
        elif not isinstance(annotation.get("image_id"), (int, str)):
            yield f"annotation {_shorten(annotation['id'])} has no image_id"
        elif annotation["image_id"] not in ids:
            image_id = _shorten(annotation["image_id"])
            yield f"annotation {_shorten(annotation['id'])} refers to the missing image {image_id}"


def _is_text(value) -> bool:
    """Whether a value is a string that can be encoded, unlike an unpaired surrogate."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _is_below(root, name) -> bool:
    """Whether `root / name` is within the folder `root` of a real path, also if it is a link."""
    with contextlib.suppress(ValueError):  # "\0" in a name
        return "\\" not in name and os.path.realpath(Path(root, name)).startswith(root + os.sep)
    return False


def _description(info) -> str:
    text = info.get("description") if isinstance(info, dict) else None
    return " ".join(text.split())[:100] if isinstance(text, str) else ""


def _shorten(value) -> str:
    return str(value)[:60]
