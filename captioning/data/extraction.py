"""Computing the features of a frozen CNN once per image, and keeping them on disk.

    array = extract_features(encoder.cnn, data.paths, model.transform, "runs/cache")
    array[[7, 3]]     # (2, V, P, C) float16, of data.paths[7] and data.paths[3]

The name of their folder is a fingerprint of the CNN (settings, precision, weights), of what the
transform returns for an image, and of the images (name, size, modification time). A change of any
of these makes a new folder; old ones stay until you delete them. The code of a backbone of your own
is not part of the fingerprint: after a change of its `forward`, delete the folder. Pooled ResNet50
features of COCO's 123,287 images take 505 MB in half precision, feature maps 24.7 GB; of either,
only the features of the current batch are read.
"""

import contextlib
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from captioning.base.device import autocast, resolve_precision, usual_defaults
from captioning.base.distributed import barrier, gather, print0, rank_and_world_size, show_progress
from captioning.base.files import atomic_write, file_lock
from captioning.data.features import FeatureArray
from captioning.data.images import BadImageError
from captioning.data.workers import WorkerLoader

FORMAT = "8"  # increase it when the content of the files, or how images are opened, changes
SHARD_SIZE = 512  # images per file; an interruption loses the features of at most one file
LARGE = 1e9  # bytes; the size of features that take more is printed first


@usual_defaults()
def extract_features(
    cnn, paths, transform, cache_dir, precision="auto", num_workers=0
) -> FeatureArray:
    """`cnn.views` of every image, loaded from `cache_dir` where already computed.

    cnn: a `networks.cnn.CNN` without a part that is trained. Runs on its device. After an
    interruption, the next call continues; with torchrun, each rank computes its share of the files.

    Raises BadImageError, which names all images that could not be read, after the features of the
    others have been computed, except for those in the same file. Raises OSError if files cannot be
    written, or those of other ranks are missing.
    """
    paths = [Path(path) for path in paths]
    folder = Path(cache_dir) / f"features-{fingerprint(cnn, paths, transform, precision)}"
    rank, _ = rank_and_world_size()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(paths), SHARD_SIZE)
    with file_lock(folder / ".lock") if rank == 0 else contextlib.nullcontext():
        barrier()  # the folder exists
        missing, bad = [start for start in starts if not is_complete(folder, start, len(paths))], []
        barrier()  # no rank writes before all ranks have listed the missing files
        if missing:
            bad = compute_shards(cnn, paths, transform, folder, missing, precision, num_workers)
        bad = sum(gather(bad), [])  # no rank reads before all ranks have written
    if bad:
        raise BadImageError(describe_bad(bad))
    for start in starts:
        if not is_complete(folder, start, len(paths)):
            raise OSError(
                f"{shard_file(folder, start)} is missing though all images were processed: do the "
                "processes share that folder? Start again, or choose another --cache-dir"
            )
    return FeatureArray([shard_file(folder, start) for start in starts])


@torch.inference_mode()
def compute_shards(cnn, paths, transform, folder, starts, precision, num_workers):
    """Compute and write this rank's share of the shards whose first images are `starts`.

    Returns the reasons why images could not be read; a shard with such an image is not written.
    """
    device = next(cnn.parameters()).device
    cnn = cnn.for_inference(precision)

    def views(images):  # a list of (3, H, W) -> (B, V, P, C) float16
        batch = torch.stack(images).to(device, memory_format=torch.channels_last)
        with autocast(device, precision):
            return cnn.views(batch).half().cpu().numpy()

    sizes = [len(paths[start : start + SHARD_SIZE]) for start in starts]
    size = views([transform(Image.new("RGB", (64, 64)))]).nbytes
    check_space(folder, sum(sizes) * size)  # of all ranks
    bad, (rank, world_size) = [], rank_and_world_size()
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
        features, known = [], len(bad)
        for batch in WorkerLoader(images, batch_size, num_workers=num_workers, collate_fn=list):
            bad += [reason for image, reason in batch if image is None]
            if len(bad) == known:
                features.append(views([image for image, _ in batch]))
            bar.update(len(batch))
        if len(bad) == known:
            with atomic_write(shard_file(folder, start)) as file:
                np.save(file, np.concatenate(features))
    bar.close()
    return bad


# ---------------------------------------------------------------------------- files


def shard_file(folder, start) -> Path:
    return folder / f"{start:08d}.npy"


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
