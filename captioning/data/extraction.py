"""Computing the features of a frozen CNN once per image, and keeping them on disk.

    array, bad = extract_features(encoder.cnn, data.paths, model.transform, "runs/cache")
    array[[7, 3]]     # (2, V, P, C) float16, of data.paths[7] and data.paths[3]
    bad               # {row: reason} of images that could not be read

The name of their folder is a fingerprint of the CNN (settings, precision, weights), of what the
transform returns for an image, and of the images (name, size, modification time). A change of any
of these makes a new folder; old ones stay until you delete them. The code of a backbone of your own
is not part of the fingerprint: after a change of its `forward`, delete the folder. Pooled ResNet50
features of COCO's 123,287 images take 505 MB in half precision, feature maps 24.7 GB; of either,
only the features of the current batch are read.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from captioning.base.device import autocast, resolve_precision, usual_defaults
from captioning.base.distributed import barrier, print0, rank_and_world_size, show_progress
from captioning.base.files import atomic_write, file_lock, write_text
from captioning.data.features import FeatureArray
from captioning.data.images import BadImageError
from captioning.data.workers import WorkerLoader

FORMAT = "7"  # increase it when the content of the files, or how images are opened, changes
SHARD_SIZE = 512  # images per file; an interruption loses the features of at most one file
LARGE = 1e9  # bytes; the size of features that take more is printed first


@usual_defaults()
def extract_features(
    cnn, paths, transform, cache_dir, precision="auto", num_workers=0, skip_bad=False
) -> tuple[FeatureArray, dict[int, str]]:
    """`cnn.views` of every image, loaded from `cache_dir` where already computed.

    cnn: a `networks.cnn.CNN` without a part that is trained. Runs on its device. After an
    interruption, the next call continues; with torchrun, each rank computes its share of the files.

    Returns the features, zeros for an image that could not be read, and {row: reason} for these.
    Unless `skip_bad`, a BadImageError at the end names them all. Raises OSError if files cannot be
    written, or those of other ranks are missing.
    """
    paths = [Path(path) for path in paths]
    folder = Path(cache_dir) / f"features-{fingerprint(cnn, paths, transform, precision)}"
    rank, _ = rank_and_world_size()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(paths), SHARD_SIZE)
    with file_lock(folder / ".lock") if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            delete_outdated_shards(folder, paths, transform)
        barrier()
        missing = [start for start in starts if not is_complete(folder, start, len(paths))]
        barrier()  # no rank writes before all ranks have listed the missing files
        if missing:
            compute_shards(cnn, paths, transform, folder, missing, precision, num_workers)
        barrier()  # no rank reads before all ranks have written
    for start in starts:
        if not is_complete(folder, start, len(paths)):
            raise OSError(
                f"{shard_file(folder, start)} is missing though all images were processed: do the "
                "processes share that folder? Start again, or choose another --cache-dir"
            )
    bad = {}
    for file in sorted(folder.glob("*.bad.json")):
        bad |= {int(row): reason for row, reason in json.loads(file.read_text()).items()}
    if bad and not skip_bad:
        raise BadImageError(describe_bad(bad.values()))
    return FeatureArray([shard_file(folder, start) for start in starts]), bad


@torch.inference_mode()
def compute_shards(cnn, paths, transform, folder, starts, precision, num_workers):
    """Compute and write this rank's share of the shards whose first images are `starts`."""
    device = next(cnn.parameters()).device
    cnn = cnn.for_inference(precision)

    def views(images):  # a list of (3, H, W) -> (B, V, P, C) float16
        batch = torch.stack(images).to(device, memory_format=torch.channels_last)
        with autocast(device, precision):
            return cnn.views(batch).half().cpu().numpy()

    zeros = np.zeros_like(views([transform(Image.new("RGB", (64, 64)))])[0])
    sizes = [len(paths[start : start + SHARD_SIZE]) for start in starts]
    check_space(folder, sum(sizes) * zeros.nbytes)  # of all ranks
    rank, world_size = rank_and_world_size()
    bar = tqdm(
        total=sum(sizes[rank::world_size]),
        unit="img",
        desc="extracting features",
        mininterval=1,
        leave=False,
        file=sys.stdout,
        disable=not show_progress(),
    )
    for start in starts[rank::world_size]:
        images = ReadableImages(paths[start : start + SHARD_SIZE], transform)
        batch_size = 8 if device.type == "cpu" else 64
        features, bad = [], {}
        for batch in WorkerLoader(images, batch_size, num_workers=num_workers, collate_fn=list):
            good = [image for image, _ in batch if image is not None]
            computed = iter(views(good) if good else [])
            for image, reason in batch:
                if image is None:
                    bad[start + len(features)] = reason
                features.append(zeros if image is None else next(computed))
            bar.update(len(batch))
        write_shard(folder, start, np.stack(features), bad)
    bar.close()


# ---------------------------------------------------------------------------- files


def shard_file(folder, start) -> Path:
    return folder / f"{start:08d}.npy"


def write_shard(folder, start, features, bad):
    """Write the features and the bad images of one shard.

    The bad images are written first, so that a kill never leaves features without their list.
    """
    if bad:
        write_text(folder / f"{start:08d}.bad.json", json.dumps(bad))
    with atomic_write(shard_file(folder, start)) as file:
        np.save(file, features)


def check_space(folder, need):
    """Raise OSError if fewer than `need` bytes are free in `folder`. Prints `need` if large."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"cannot write {need / 1e6:.1f} MB of features to {folder}: only {free / 1e6:.1f} MB "
            "are free; free some space, or choose another --cache-dir"
        )
    if need > LARGE:
        print0(f"writing {need / 1e9:.1f} GB of features to {folder}")


def is_complete(folder, start, images) -> bool:
    """Whether the file of features that begins at image `start` can be read."""
    try:
        features = np.load(shard_file(folder, start), mmap_mode="r")
        return len(features) == min(SHARD_SIZE, images - start)
    except (OSError, ValueError, EOFError):
        return False


def delete_outdated_shards(folder, paths, transform):
    """Delete shards with an image that could not be read when they were computed, and now can."""
    for file in folder.glob("*.bad.json"):
        try:
            bad = [int(row) for row in json.loads(file.read_text())]
            still_bad = all(ReadableImages(paths, transform)[row][1] for row in bad)
        except ValueError:
            still_bad = False
        if not still_bad:
            (folder / file.name.replace(".bad.json", ".npy")).unlink(missing_ok=True)
            file.unlink()


def fingerprint(cnn, paths, transform, precision) -> str:
    """A hash of the CNN (its layers and weights), the precision, the transform and the images."""
    precision = resolve_precision(next(cnn.parameters()).device, precision)
    settings = (FORMAT, SHARD_SIZE, cnn, cnn.flip, cnn.pooled, precision, transform)
    digest = hashlib.sha256(repr(settings).encode())
    pixels = np.arange(240 * 320 * 3, dtype=np.uint32) % 251  # an arbitrary but fixed image
    image = Image.fromarray(pixels.astype(np.uint8).reshape(240, 320, 3))
    digest.update(transform(image).numpy().tobytes())
    for name, tensor in cnn.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for path in paths:
        try:
            status = path.stat()
            version = status.st_size, status.st_mtime_ns
        except OSError:
            version = None
        digest.update(f"{path.parent.name}/{path.name}{version}".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------- images


class ReadableImages(Dataset):
    """(image, None) for an image that can be read, (None, reason) for one that cannot."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        try:
            return self.transform(self.paths[row]), None
        except BadImageError as error:
            return None, str(error)


def find_bad_images(paths, transform, num_workers=0) -> dict[int, str]:
    """{row: reason} for the images that cannot be read; opens every image."""
    images = ReadableImages(paths, transform)
    loader = WorkerLoader(images, None, num_workers=num_workers, collate_fn=reason_of)
    bar = tqdm(loader, "checking images", leave=False, disable=not show_progress())
    return {row: reason for row, reason in enumerate(bar) if reason}


def reason_of(item):
    """Of an item of `ReadableImages`: the image need not leave the worker."""
    return item[1]


def describe_bad(reasons) -> str:
    return f"{len(reasons)} images cannot be read:\n  " + "\n  ".join(reasons)
