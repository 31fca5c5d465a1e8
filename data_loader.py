"""COCO captions from disk to batches.

    data = CaptionData("train2017", "annotations/captions_train2017.json")
    data.paths[0], data.captions[0]            # an image and its five captions
    loader = get_loader(data, vocab, transform=eval_transform(224), mode="train", batch_size=64)
    for images, captions, lengths in loader:   # (B, 3, 224, 224), (B, T), (B,)
        ...

One's own images take the same road: a folder, and a JSON in COCO's captions format.
"""

import contextlib
import copy
import io
import json
import os
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset

from vocabulary import pack, whole_file

MODES = ("train", "val", "test")


class DataError(ValueError):
    """Captions that cannot be used; the message says which file, why, and what to do."""


# ---------------------------------------------------------------------------- what is on disk


class CaptionData:
    """The images of one split and all their captions, in the order of their ids.

    image_ids: COCO's ids. paths: the files. captions: for each image, the list of its captions.
    rows: their places, 0..N-1, which `without` keeps: where their features lie.
    uncaptioned: file names of listed images without any caption, which are left out.
    """

    def __init__(self, image_dir, captions_file):
        """Read a captions file in COCO's format. Raises DataError for anything wrong with it."""
        self.image_dir, self.captions_file = Path(image_dir), Path(captions_file)
        if not self.image_dir.is_dir():
            raise DataError(f"there is no images folder {image_dir}; check the path")
        coco = read_captions(captions_file)
        self.image_ids, self.paths, self.captions, self.uncaptioned = [], [], [], []
        for image_id in sorted(coco.getImgIds()):
            name = coco.imgs[image_id]["file_name"]
            captions = [annotation["caption"] for annotation in coco.imgToAnns.get(image_id, [])]
            if captions:
                self.image_ids.append(image_id)
                self.paths.append(inside(self.image_dir, name, captions_file))
                self.captions.append(captions)
            else:
                self.uncaptioned.append(name)
        if not self.paths:
            raise DataError(f"{captions_file} has no image with a caption")
        self.rows = list(range(len(self.paths)))

    def __len__(self):
        return len(self.paths)

    def without(self, rows) -> "CaptionData":
        """A copy that leaves out the images whose row is in `rows`."""
        kept = [place for place, row in enumerate(self.rows) if row not in rows]
        smaller = copy.copy(self)
        for name in ("image_ids", "paths", "captions", "rows"):
            setattr(smaller, name, [getattr(self, name)[place] for place in kept])
        return smaller


def read_captions(captions_file) -> COCO:
    """A captions file through COCO's own API, without its chatter, and checked."""
    path = Path(captions_file)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"there is no captions file {path}; check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); is it the right file, and whole?") from None
    problem = check_captions(content)
    if problem:
        raise DataError(f"{path}: {problem}")
    coco = COCO()
    coco.dataset = {key: content[key] for key in ("images", "annotations")}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_captions(content) -> str | None:
    """What is wrong with a captions file's content, as a sentence; None if nothing is."""
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return f"there is no list of {key!r}; a captions file has 'images' and 'annotations'"
    names = {}
    for image in content["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            return f"every entry of 'images' needs an id, {short(image)} has none"
        if not is_text(image.get("file_name")):
            return f"image {short(image['id'])} has no file_name"
        if image["id"] in names:
            return f"image id {short(image['id'])} is listed twice"
        names[image["id"]] = image["file_name"]
    if len({type(image_id) for image_id in names}) > 1:
        return "some image ids are numbers and some are text; make them one kind"
    wrong = []
    for place, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            wrong.append(f"annotation number {place} is not an object")
            continue
        which = f"annotation {short(annotation.setdefault('id', place))}"
        image_id, caption = annotation.get("image_id"), annotation.get("caption")
        if not isinstance(annotation["id"], (int, str)):
            wrong.append(f"annotation number {place} has an id that is neither number nor text")
        elif caption == "" or (is_text(caption) and not caption.strip()):
            wrong.append(f"{which} has an empty caption")
        elif not is_text(caption):
            wrong.append(f"{which} has no caption text")
        elif not isinstance(image_id, (int, str)):
            wrong.append(f"{which} has no image_id")
        elif image_id not in names:
            wrong.append(f"{which} is of image {short(image_id)}, which 'images' does not list")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        return "; ".join(wrong[:3]) + more + "; correct or remove these entries"
    return None


def is_text(value) -> bool:
    """A string that is not empty and can be written into a file, as half an emoji cannot."""
    with contextlib.suppress(UnicodeEncodeError):
        return isinstance(value, str) and bool(value.encode())
    return False


def short(value) -> str:
    return str(value)[:60]


def inside(folder: Path, name: str, captions_file) -> Path:
    """`folder / name`, refused if it leads out of the folder by any way, links included."""
    path = folder / name
    straight = "/" not in name and "\\" not in name and "\0" not in name and name not in (".", "..")
    if straight and not path.is_symlink():
        return path
    root = os.path.realpath(folder)
    with contextlib.suppress(ValueError):  # "\0" in a name
        if "\\" not in name and os.path.realpath(path).startswith(root + os.sep):
            return path
    raise DataError(
        f"{captions_file}: file_name {short(name)!r} leads outside {folder}; correct it"
    )


# ---------------------------------------------------------------------------- batches


class ImageDataset(Dataset):
    """Every image of `data` once: (images, places in `data`).

    With `features`, an array with a row for each of `data.rows`, these stand for the images;
    otherwise an image is `transform(path)`.
    """

    def __init__(self, data: CaptionData, transform=None, features=None):
        self.data, self.transform, self.features = data, transform, features
        self.rows = np.array(data.rows)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, places):
        """A whole batch at once: (B, 3, H, W) or (B, feature_size), (B,)."""
        return self.images(np.asarray(places)), torch.as_tensor(places)

    def images(self, places):
        if self.features is not None:
            return torch.from_numpy(self.features[self.rows[places]].astype(np.float32))
        return torch.stack([self.transform(self.data.paths[place]) for place in places])


class CaptionDataset(ImageDataset):
    """Every caption of `data` beside its image; all captions lie in one array of integers."""

    def __init__(self, data: CaptionData, vocab, transform=None, features=None, cache_dir=None):
        super().__init__(data, transform, features)
        packed = pack([caption for captions in data.captions for caption in captions], cache_dir)
        self.ids, self.lengths = vocab.encode_all(packed)  # <start> and <end> included
        self.ends = np.cumsum(self.lengths)
        counts = [len(captions) for captions in data.captions]
        self.image = np.repeat(np.arange(len(data)), counts)  # caption -> image

    def __len__(self):
        return len(self.lengths)

    def __getitems__(self, indices):
        """A whole batch at once: images, captions (B, T) with 0 as padding, lengths (B,)."""
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        captions = np.zeros((len(indices), lengths.max()), dtype=np.int64)
        real = np.arange(captions.shape[1]) < lengths[:, None]
        starts = np.repeat(self.ends[indices] - lengths, lengths)
        within = np.concatenate([np.arange(length) for length in lengths])
        captions[real] = self.ids[starts + within]
        images = self.images(self.image[indices])
        return images, torch.from_numpy(captions), torch.from_numpy(lengths)


class BucketSampler:
    """Batches of captions of like length, so that hardly anything is padding.

    Every caption comes exactly once per epoch. Which captions share a batch, and the order of the
    batches, are drawn anew from (seed, epoch) alone: call `set_epoch` before each epoch, with
    `start` to begin at a later batch. `rank` of `world` processes takes its share of every batch.
    """

    def __init__(self, lengths, batch_size, seed=0, rank=0, world=1):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world = rank, world
        if len(self.lengths) // max(len(self), 1) < world:  # of the smallest batch
            raise ValueError(
                f"{world} processes share every batch, and {len(self.lengths)} captions in "
                f"batches of at most {batch_size} leave some process nothing: take a larger "
                "batch_size, or fewer processes"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches = np.array_split(order, len(self))  # of equal size, but for one caption
        for batch in rng.permutation(len(batches))[self.start :]:
            yield batches[batch][self.rank :: self.world]


def get_loader(data, vocab=None, transform=None, features=None, mode="train", batch_size=64,
               seed=0, num_workers=0, rank=0, world=1, cache_dir=None):  # fmt: skip
    """A DataLoader over a split.

    mode "train": (images, captions, lengths), every caption once, reshuffled each epoch; call
        `loader.batch_sampler.set_epoch(epoch)` before each.
    mode "val": the same triples in a fixed order, batched by length all the same.
    mode "test": (images, places): every image once, in order, for captioning;
        `data.captions[place]` are its references.

    `features` (see `ImageDataset`) take the place of the images: (B, feature_size). Of `world`
    processes, the one with number `rank` gets its share: of each batch in training, of the batches
    in validation, every world-th image in test. `cache_dir` keeps the tokenised captions.
    Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if mode == "test":
        dataset = ImageDataset(data, transform, features)
        mine = range(rank, len(dataset), world)
        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    else:
        dataset = CaptionDataset(data, vocab, transform, features, cache_dir)
        if mode == "train":
            batches = BucketSampler(dataset.lengths, batch_size, seed, rank, world)
        else:
            order = np.argsort(dataset.lengths, kind="stable")
            batches = np.split(order, range(batch_size, len(order), batch_size))[rank::world]
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=as_it_is,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def as_it_is(batch):
    """The dataset makes whole batches; and a lambda could not be sent to a worker on Windows."""
    return batch


# ---------------------------------------------------------------------------- splits


def karpathy_splits(karpathy_file, out_dir) -> dict[str, Path]:
    """Write the split of Karpathy & Fei-Fei (2015) as three captions files in COCO's format.

    Reads their `dataset_coco.json` (or `dataset_flickr8k.json`, ..). "restval" counts as training,
    as is usual. Images are named as they lie below one folder, e.g. "val2014/COCO_val.. .jpg".
    """
    try:
        images = json.loads(Path(karpathy_file).read_text(encoding="utf-8"))["images"]
        splits = defaultdict(lambda: {"images": [], "annotations": []})
        for number, image in enumerate(images):
            split = splits[{"restval": "train"}.get(image["split"], image["split"])]
            image_id = image.get("cocoid", image.get("imgid", number))
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            split["images"].append({"id": image_id, "file_name": name})
            split["annotations"] += [
                {"id": sentence["sentid"], "image_id": image_id, "caption": sentence["raw"].strip()}
                for sentence in image["sentences"]
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{karpathy_file} is not a Karpathy split file ({type(error).__name__}: {error})"
        ) from None
    return write_splits(splits, out_dir, f"split by {Path(karpathy_file).name}")


def random_splits(captions_file, out_dir, shares, seed=0) -> dict[str, Path]:
    """Share out the images of one captions file, e.g. {"train": 0.8, "val": 0.1, "test": 0.1}.

    An image and all its captions land in one split, the same one every time, even if its file is
    listed as several images.
    """
    content = read_captions(captions_file).dataset
    first = {}  # file -> the first of its ids
    for image in sorted(content["images"], key=itemgetter("id")):
        first.setdefault(image["file_name"], image["id"])
    ids = np.array(sorted(first.values()))
    ids = ids[np.random.default_rng(seed).permutation(len(ids))].tolist()
    stops = np.cumsum(list(shares.values())) * len(ids)
    stops = [0, *(round(stop) for stop in stops)]
    if 0 in np.diff(stops):
        raise DataError(f"{captions_file} lists too few images ({len(ids)}) for {shares}")
    chosen = {}
    for name, start, stop in zip(shares, stops, stops[1:], strict=False):
        chosen |= dict.fromkeys(ids[start:stop], name)
    splits = {name: {"images": [], "annotations": []} for name in shares}
    for image in content["images"]:
        chosen[image["id"]] = chosen[first[image["file_name"]]]
        splits[chosen[image["id"]]]["images"].append(image)
    for annotation in content["annotations"]:
        splits[chosen[annotation["image_id"]]]["annotations"].append(annotation)
    return write_splits(splits, out_dir, f"drawn from {Path(captions_file).name}, seed {seed}")


def write_splits(splits, out_dir, description) -> dict[str, Path]:
    """Write captions_{split}.json files; each appears whole or not at all."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    files = {}
    for name, split in splits.items():
        files[name] = Path(out_dir) / f"captions_{name}.json"
        content = {"info": {"description": description}, "licenses": [], **split}
        with whole_file(files[name]) as file:
            file.write(json.dumps(content).encode())
    return files
