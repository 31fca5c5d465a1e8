"""What a frozen CNN sees never changes: compute it once per image, keep it, reuse it.

    features = encode_images(model.encoder, data.paths, model.transform, "runs/cache")
    features.rows[7]     # float16, the pooled CNN features of data.paths[7]
    features.bad         # {row: reason} for the images that could not be read

The file's name is a fingerprint of the encoder (its class, settings and weights), of what the
transform makes of an image, and of the images (name, size, time of change), so that features of
anything else are not taken for these. Half precision halves the disk and the memory: ResNet50
features of COCO's 123,287 images take 505 MB, and are memory-mapped.
"""

import contextlib
import copy
import ctypes
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint import one_after_the_other, write_atomically
from data_loader import as_it_is
from distributed import barrier, fast_precision, is_watched, rank_and_world, say
from model import BadImageError

FORMAT = "3"  # raise it when what the files hold, or how images are opened, changes
TODO, DONE, BAD = 0, 1, 2  # the state of a row
SAVE_EVERY = 2048  # images between two writes: what an interruption can cost
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in malloc.h


@dataclass
class Features:
    rows: np.ndarray  # (images, feature_size) float16, memory-mapped; zeros for a bad image
    bad: dict[int, str]  # row -> why it could not be read


def encode_images(encoder, paths, transform, cache_dir, batch_size=None, workers=0,
                  skip_bad=False) -> Features:  # fmt: skip
    """`encoder.pool` of every image, from `cache_dir` if it is there, else computed and kept.

    Runs on the encoder's device. Interrupted, it goes on where it stopped; of several processes
    (torchrun) each encodes its share into the same files. An image that cannot be read does not
    stop the others; in the end all such are named by a BadImageError or, with `skip_bad`, listed in
    `bad` for the caller to judge. Without a `batch_size` it is the one that suits the device.
    Raises OSError if the files cannot be written, or if other processes' features are not in them.
    """
    paths = [Path(path) for path in paths]
    name = Path(cache_dir) / f"features-{fingerprint(encoder, paths, transform)}"
    name.parent.mkdir(parents=True, exist_ok=True)
    rank, world = rank_and_world()
    lock = name.with_name(f".{name.name}.lock")
    with one_after_the_other(lock) if rank == 0 else contextlib.nullcontext():
        fill(name, encoder, paths, transform, batch_size, workers, rank, world)
    state = np.load(f"{name}.state.npy")
    again = Readable(paths, transform)
    bad = {
        int(row): again[row][1] or f"{paths[row]}: it could not be read at first; start again"
        for row in np.flatnonzero(state == BAD)
    }
    if bad and not skip_bad:
        raise BadImageError(describe_bad(bad.values()))
    return Features(np.load(f"{name}.npy", mmap_mode="r"), bad)


def fill(name, encoder, paths, transform, batch_size, workers, rank, world):
    """See to it that the files hold all features; each of `world` processes adds its share."""
    if rank == 0:
        if not (is_intact(name) or is_begun(name, len(paths))):
            create(name, (len(paths), encoder.feature_size))
        forget_bad(name)
    barrier()  # nobody writes before the files are there
    todo = np.array_split(np.flatnonzero(np.load(f"{name}.state.npy") == TODO), world)[rank]
    barrier()  # nobody writes before all know their share
    if len(todo):
        with keep_freed_memory():
            encode_rows(encoder, paths, transform, todo, name, batch_size, workers)
    barrier()  # nobody reads before all have written
    state = np.load(f"{name}.state.npy")
    if (state == TODO).any():
        raise OSError(
            f"{(state == TODO).sum()} features are missing from {name}.npy, though all images were "
            "encoded: do the processes share that folder? Start again, or name another --cache"
        )
    if rank == 0 and not Path(f"{name}.json").exists():
        write_atomically(json.dumps({"sha256": checksum(name)}), Path(f"{name}.json"))
    barrier()


@torch.inference_mode()
def encode_rows(encoder, paths, transform, todo, name, batch_size, workers):
    """Fill the files' rows for the images in `todo`."""
    device, encoder = encoder.linear.weight.device, without_batch_norm(encoder)
    batch_size = batch_size or suitable_batch(device)
    images = Readable([paths[row] for row in todo], transform)
    loader = DataLoader(images, batch_size, num_workers=workers, collate_fn=as_it_is)
    bar = tqdm(total=len(paths), initial=len(paths) - len(todo), desc="encoding images",
               unit="img", mininterval=1, leave=False, file=sys.stdout,
               disable=not is_watched())  # fmt: skip
    states, pooled, saved = [], [], 0  # of the images since the last save
    for batch in loader:
        states += [BAD if image is None else DONE for image, _ in batch]
        readable = [image for image, _ in batch if image is not None]
        if readable:
            stack = torch.stack(readable)
            stack = stack.to(device, memory_format=torch.channels_last, non_blocking=True)
            with fast_precision(device):
                pooled += list(encoder.pool(stack).half().cpu().numpy())
        bar.update(len(batch))
        if len(states) >= SAVE_EVERY or saved + len(states) == len(todo):
            rows, states = todo[saved : saved + len(states)], np.array(states, np.uint8)
            # First the features, then the claim that they are there.
            write_rows(f"{name}.npy", rows[states == DONE], pooled)
            write_rows(f"{name}.state.npy", rows, states)
            states, pooled, saved = [], [], saved + len(rows)
    bar.close()


def write_rows(file, rows, values):
    """Write `values[i]` as row `rows[i]` of an .npy file, to the disk, and nothing beside it.

    A memory map would write whole pages, and over a network undo the neighbours' work in them.
    """
    start = np.load(file, mmap_mode="r").offset
    with open(file, "r+b") as opened:
        for row, value in zip(rows, values, strict=True):
            opened.seek(start + row * value.nbytes)
            opened.write(value.tobytes())
        opened.flush()
        os.fsync(opened.fileno())


def without_batch_norm(encoder):
    """A copy in eval mode that computes the same a little faster.

    A frozen BatchNorm is a multiplication and an addition, which are folded into the weights of
    the convolution before it. torchvision's quantized networks come folded: they stay as they are.
    """
    if encoder.quantized:
        return encoder
    encoder = copy.deepcopy(encoder).eval()
    encoder.backbone = fuse(encoder.backbone, inplace=True)
    return encoder.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------- the files


def create(name, shape):
    """Files of zeros for features and their states, with their room on the disk reserved."""
    for old in (".json", ".state.npy", ".npy"):
        Path(f"{name}{old}").unlink(missing_ok=True)
    try:
        for part, kind, size in ((".npy", np.float16, shape), (".state.npy", np.uint8, shape[:1])):
            np.lib.format.open_memmap(f"{name}{part}", "w+", kind, size)
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up later kills the process
                with open(f"{name}{part}", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
    except OSError as error:
        for part in (".npy", ".state.npy"):
            Path(f"{name}{part}").unlink(missing_ok=True)
        megabytes = math.prod(shape) * 2 / 1e6
        raise OSError(
            f"cannot reserve {megabytes:.0f} MB for features in {name.parent} ({error.strerror}); "
            "free some space, or name another folder with --cache"
        ) from None


def forget_bad(name):
    """Look at unreadable images again: a disk or a network may be well by now."""
    state = np.load(f"{name}.state.npy", mmap_mode="r+")
    if (state == BAD).any():
        Path(f"{name}.json").unlink(missing_ok=True)
        state[state == BAD] = TODO
        state.flush()


def is_begun(name, images) -> bool:
    """Are there unfinished files to go on with?"""
    try:
        sizes = {len(np.load(f"{name}{part}", mmap_mode="r")) for part in (".npy", ".state.npy")}
        return sizes == {images} and not Path(f"{name}.json").exists()
    except (OSError, ValueError, EOFError):
        return False


def is_intact(name) -> bool:
    """Are the features complete, and the bytes those that were written?"""
    try:
        intact = json.loads(Path(f"{name}.json").read_text())["sha256"] == checksum(name)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        print(f"{name}.npy is damaged and is computed anew")
    return intact


def checksum(name) -> str:
    digest = hashlib.sha256()
    for part in (".npy", ".state.npy"):
        with open(f"{name}{part}", "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def fingerprint(encoder, paths, transform) -> str:
    """A short name for (encoder, transform, images): other input, other name."""
    device, kind = encoder.linear.weight.device, type(encoder).__qualname__
    with fast_precision(device):
        fast = torch.is_autocast_enabled(device.type)
    facts = FORMAT, kind, encoder.feature_size, encoder.mirror, fast, transform
    digest = hashlib.sha256(repr(facts).encode())
    pixels = np.arange(240 * 320 * 3, dtype=np.uint32) % 251  # some image, always the same
    some_image = Image.fromarray(pixels.astype(np.uint8).reshape(240, 320, 3))
    digest.update(transform(some_image).numpy().tobytes())
    for name, tensor in encoder.backbone.state_dict().items():
        digest.update(name.encode())
        tensor = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for path in paths:
        try:
            status = path.stat()
            facts = status.st_size, status.st_mtime_ns
        except OSError:
            facts = None
        digest.update(f"{path.parent.name}/{path.name}{facts}".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------- images


class Readable(Dataset):
    """(image, None) for an image that can be read, (None, reason) for one that cannot."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        try:
            return self.transform(self.paths[row]), None
        except ValueError as error:  # model.BadImageError
            return None, str(error)


def find_bad_images(paths, transform, workers=0) -> dict[int, str]:
    """{row: reason} for the images that cannot be read: looks at each one of them."""
    looked = DataLoader(Readable(paths, transform), None, num_workers=workers)
    bar = tqdm(looked, "checking images", unit="img", mininterval=1, leave=False, file=sys.stdout,
               disable=not is_watched())  # fmt: skip
    return {row: why for row, (_, why) in enumerate(bar) if why}


def describe_bad(reasons) -> str:
    return f"{len(reasons)} images cannot be read:\n  " + "\n  ".join(reasons)


def leave_out(splits, bad, skip):
    """Name what cannot be used. Unreadable images stop the run, unless they may be left out."""
    for split in splits:
        if split.uncaptioned:
            count = len(split.uncaptioned)
            say(f"{split.captions_file}: {count} images have no caption and are left out")
    reasons = [why for rows in bad for why in rows.values()]
    if not reasons:
        return
    found = describe_bad(reasons)
    if not skip:
        raise BadImageError(f"{found}\nreplace them, or leave them out with --skip-bad-images")
    say(f"{found}\nThey are left out, with their captions.")
    for split, rows in zip(splits, bad, strict=True):
        if len(rows) == len(split):
            raise BadImageError(f"no image of {split.captions_file} can be read")


def suitable_batch(device) -> int:
    """Images per forward pass."""
    return 8 if device.type == "cpu" else 64


@contextlib.contextmanager
def keep_freed_memory():
    """Within it this process keeps up to a gigabyte that tensors free, for the next ones.

    Linux' malloc gives large blocks back to the system, which fills them with zeros when the next
    layer asks for them: about a tenth of a CNN's time on a CPU. The numbers are those of
    mallopt(3); afterwards they are the largest that malloc would come to by itself. With another
    C library this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    usual = ((M_TRIM_THRESHOLD, 2**26), (M_MMAP_THRESHOLD, 2**25))
    for parameter, size in (*usual, (M_TRIM_THRESHOLD, 2**30), (M_MMAP_THRESHOLD, 2**30)):
        mallopt(parameter, size)  # where the last is refused, the usual one holds
    try:
        yield
    finally:
        for parameter, size in usual:
            mallopt(parameter, size)
