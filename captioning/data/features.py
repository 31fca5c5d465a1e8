"""The features of a frozen CNN, computed once per image and kept on disk.

    extracted = extract_features(model.encoder, data.paths, model.transform, "runs/cache")
    extracted.features[[7, 3]]     # (2, V, P, C) float16, of data.paths[7] and data.paths[3]
    extracted.bad                  # {index: reason} for images that could not be read

The name of their folder is a fingerprint of the encoder (class, settings, precision, weights), of
what the transform returns for an image, and of the images (name, size, modification time). Pooled
ResNet50 features of COCO's 123,287 images take 505 MB in half precision, feature maps 24.7 GB; of
neither more is read than the images of a batch. If the last stage of the CNN is trained, the frozen
part is the rest, and the files contain the maps before that stage: (N, V, C, H, W).
"""

import contextlib
import copy
import ctypes
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from captioning.networks.backbones import fold_batch_norm
from data_loader import identity_collate
from captioning.base.distributed import (
    autocast,
    barrier,
    print0,
    rank_and_world_size,
    resolve_precision,
    show_progress,
)
from captioning.base.files import atomic_write, file_lock, write_text
from captioning.data.images import BadImageError

FORMAT = "5"  # increase it when the content of the files, or how images are opened, changes
SHARD_SIZE = 512  # images per file; an interruption loses the features of at most one file
LARGE = 1e9  # bytes of features, whose size is printed before they are written
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


class FeatureArray:
    """The features of all images, read from one file per SHARD_SIZE images when they are indexed.

    The files are read, not memory-mapped: pages of a map would count as memory of the process.
    """

    def __init__(self, files):
        shards = [np.load(file, mmap_mode="r") for file in files]
        self.files, self.offset, self.dtype = list(files), shards[0].offset, shards[0].dtype
        self.shape = (sum(map(len, shards)), *shards[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        """indices: an array (B,) of integers, or a slice -> (B, V, ...) float16."""
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices {indices.tolist()} of {len(self)} images")
        features = np.empty((len(indices), *self.shape[1:]), self.dtype)
        size, shard = features[:1].nbytes, indices // SHARD_SIZE
        for number in np.unique(shard):
            with open(self.files[number], "rb", buffering=0) as file:
                for row in np.flatnonzero(shard == number):
                    file.seek(self.offset + int(indices[row]) % SHARD_SIZE * size)
                    if file.readinto(features[row]) != size:
                        raise OSError(f"{self.files[number]} is shorter than when it was opened")
        return features


@dataclass
class ExtractedFeatures:
    features: FeatureArray  # zeros for an image that could not be read
    bad: dict[int, str]  # index -> reason


def extract_features(encoder, paths, transform, cache_dir, batch_size=None, num_workers=0,
                     skip_bad=False) -> ExtractedFeatures:
    """`encoder.forward_views` of every image, loaded from `cache_dir` where already computed.

    Runs on the encoder's device, in its precision. After an interruption, the next call continues;
    with torchrun, each rank computes its share of the files. An unreadable image does not stop the
    extraction: at the end, all unreadable images are named in a BadImageError or, with `skip_bad`,
    listed in `bad`. Raises OSError if files cannot be written, or those of other ranks are missing.
    """
    paths = [Path(path) for path in paths]
    folder = Path(cache_dir) / f"features-{fingerprint(encoder, paths, transform)}"
    rank, world_size = rank_and_world_size()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    lock = file_lock(folder / ".lock") if rank == 0 else contextlib.nullcontext()
    starts = range(0, len(paths), SHARD_SIZE)
    with lock:
        if rank == 0:
            delete_outdated_shards(folder, paths, transform)
        barrier()
        missing = [start for start in starts if not is_complete(folder, start, len(paths))]
        barrier()  # no rank writes before all ranks have listed the missing files
        if missing:
            with reuse_freed_memory():
                compute_shards(encoder, paths, transform, folder, missing, batch_size, num_workers)
        barrier()  # no rank reads before all ranks have written
    for start in starts:
        if not is_complete(folder, start, len(paths)):
            raise OSError(
                f"{shard_file(folder, start)} is missing though all images were processed: do the "
                "processes share that folder? Start again, or choose another --cache-dir"
            )
    bad = {int(i): why for file in sorted(folder.glob("*.bad.json"))
           for i, why in json.loads(file.read_text()).items()}
    if bad and not skip_bad:
        raise BadImageError(describe_bad(bad.values()))
    return ExtractedFeatures(FeatureArray([shard_file(folder, start) for start in starts]), bad)


@torch.inference_mode()
def compute_shards(encoder, paths, transform, folder, starts, batch_size, num_workers):
    """Compute and write this rank's share of the shards whose first images are `starts`."""
    device, encoder = encoder.linear.weight.device, optimized_for_inference(encoder)
    black = transform(Image.new("RGB", (64, 64)))
    zeros = np.zeros_like(forward_batch(encoder, [black], device)[0])
    sizes = [len(paths[start : start + SHARD_SIZE]) for start in starts]
    check_space(folder, sum(sizes) * zeros.nbytes)  # of all ranks
    rank, world_size = rank_and_world_size()
    starts, missing = starts[rank::world_size], sum(sizes[rank::world_size])
    bar = tqdm(total=len(paths), initial=len(paths) - missing, unit="img",
               desc="extracting features", mininterval=1, leave=False, file=sys.stdout,
               disable=not show_progress())
    for start in starts:
        images = ReadableImages(paths[start : start + SHARD_SIZE], transform)
        loader = DataLoader(images, batch_size or default_batch_size(device),
                            num_workers=num_workers, collate_fn=identity_collate)
        features, bad = [], {}
        for batch in loader:
            good = [image for image, _ in batch if image is not None]
            computed = iter(forward_batch(encoder, good, device))
            for image, reason in batch:
                if image is None:
                    bad[start + len(features)] = reason
                features.append(zeros if image is None else next(computed))
            bar.update(len(batch))
        write_shard(folder, start, np.stack(features), bad)
    bar.close()


def forward_batch(encoder, images, device):
    """A list of images (3, H, W) -> their `forward_views` (B, V, ...), float16."""
    if not images:
        return []
    batch = torch.stack(images)
    batch = batch.to(device, memory_format=torch.channels_last, non_blocking=True)
    with autocast(device, encoder.precision):
        return encoder.forward_views(batch).half().cpu().numpy()


def optimized_for_inference(encoder):
    """A copy in eval mode that computes the same function faster, within `autocast`.

    In bfloat16, weights are converted here instead of by autocast in every batch: 7 % more images
    per second with ResNet50 on a CPU. torchvision's quantized networks remain as they are.
    """
    if encoder.quantized:
        return encoder
    encoder = copy.deepcopy(encoder).eval()
    fold_batch_norm(encoder.trunk, encoder.image_size)  # in place
    if resolve_precision(encoder.linear.weight.device, encoder.precision) == "bfloat16":
        for layer in encoder.trunk.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(torch.bfloat16)
    return encoder


def default_batch_size(device) -> int:
    """Images per forward pass."""
    return 8 if device.type == "cpu" else 64


# ---------------------------------------------------------------------------- files


def shard_file(folder, start) -> Path:
    return folder / f"{start:08d}.npy"


def write_shard(folder, start, features, bad):
    """Write the features and the bad images of one shard.

    The bad images are written first, so that a kill never leaves features without their list.
    """
    if bad:
        write_text(bad_file(folder, start), json.dumps(bad))
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


def bad_file(folder, start) -> Path:
    return folder / f"{start:08d}.bad.json"


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
            bad = [int(index) for index in json.loads(file.read_text())]
            still_bad = all(ReadableImages(paths, transform)[index][1] for index in bad)
        except ValueError:
            still_bad = False
        if not still_bad:
            (folder / file.name.replace(".bad.json", ".npy")).unlink(missing_ok=True)
            file.unlink()


def fingerprint(encoder, paths, transform) -> str:
    """A hash of encoder, transform and images. Of the CNN, only what `forward_views` computes."""
    precision = resolve_precision(encoder.linear.weight.device, encoder.precision)
    settings = (FORMAT, SHARD_SIZE, type(encoder).__qualname__, encoder.feature_size, encoder.flip,
                encoder.pooled, precision, transform)
    digest = hashlib.sha256(repr(settings).encode())
    pixels = np.arange(240 * 320 * 3, dtype=np.uint32) % 251  # an arbitrary but fixed image
    image = Image.fromarray(pixels.astype(np.uint8).reshape(240, 320, 3))
    digest.update(transform(image).numpy().tobytes())
    for name, tensor in encoder.trunk.state_dict().items():
        digest.update(name.encode())
        tensor = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
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

    def __getitem__(self, index):
        try:
            return self.transform(self.paths[index]), None
        except ValueError as error:  # images.BadImageError
            return None, str(error)


def find_bad_images(paths, transform, num_workers=0) -> dict[int, str]:
    """{index: reason} for the images that cannot be read; opens every image."""
    loader = DataLoader(ReadableImages(paths, transform), None, num_workers=num_workers)
    bar = tqdm(loader, "checking images", unit="img", mininterval=1, leave=False, file=sys.stdout,
               disable=not show_progress())
    return {index: reason for index, (_, reason) in enumerate(bar) if reason}


def describe_bad(reasons) -> str:
    return f"{len(reasons)} images cannot be read:\n  " + "\n  ".join(reasons)


@contextlib.contextmanager
def reuse_freed_memory():
    """Keep up to a gigabyte of freed memory in this process, instead of returning it to Linux.

    glibc returns large freed blocks to the system, which clears them when the next layer allocates
    memory: 3 to 5 % of a CNN's time on a CPU. The thresholds are described in mallopt(3);
    afterwards they are the largest that malloc would choose by itself. No effect with another C
    library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    default = ((M_TRIM_THRESHOLD, 2**26), (M_MMAP_THRESHOLD, 2**25))
    for parameter, size in (*default, (M_TRIM_THRESHOLD, 2**30), (M_MMAP_THRESHOLD, 2**30)):
        mallopt(parameter, size)  # if the last value is rejected, the default stays in effect
    try:
        yield
    finally:
        for parameter, size in default:
            mallopt(parameter, size)
