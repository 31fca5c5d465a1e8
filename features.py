"""What a frozen CNN sees never changes: compute it once per image, keep it, reuse it.

    features = encode_images(model.encoder, data.paths, model.transform, "runs/cache")
    features.rows[7]     # float16, the pooled CNN features of data.paths[7]
    features.bad         # {row: reason} for the images that could not be read

The file's name is a fingerprint of the weights, the transform and the images (name, size, time of
change), so features of anything else are never taken for these. Half precision halves the disk and
the memory: ResNet50 features of COCO's 123,287 images take 505 MB, and are memory-mapped.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SAVE_EVERY = 2000  # images between two notes of how far it got: what an interruption can cost


@dataclass
class Features:
    rows: np.ndarray  # (images, feature_size) float16, memory-mapped; zeros for a bad image
    bad: dict[int, str]  # row -> why it could not be read


def encode_images(encoder, paths, transform, cache_dir, batch_size=64, workers=0):
    """`encoder.pool` of every image, from `cache_dir` if it is there, else computed and kept.

    Runs on the encoder's device. Interrupted, it goes on where it stopped. An image that cannot
    be read does not stop the others: all are listed in `bad`, for the caller to judge.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    name = fingerprint(encoder, paths, transform)
    array, note = cache_dir / f"features-{name}.npy", cache_dir / f"features-{name}.json"
    state = {"done": 0, "bad": {}}
    if note.exists() and array.exists():
        state = json.loads(note.read_text())
    shape = (len(paths), encoder.feature_size)
    if state["done"] == 0:
        rows = np.lib.format.open_memmap(array, "w+", np.float16, shape)
    elif state["done"] < len(paths):
        rows = np.lib.format.open_memmap(array, "r+")
    if state["done"] < len(paths):
        _encode(encoder, paths, transform, rows, state, note, batch_size, workers)
    rows = np.load(array, mmap_mode="r")
    return Features(rows, {int(row): why for row, why in state["bad"].items()})


@torch.inference_mode()
def _encode(encoder, paths, transform, rows, state, note, batch_size, workers):
    was_training = encoder.training
    encoder.eval()
    device = encoder.linear.weight.device
    start, saved = state["done"], state["done"]
    todo = DataLoader(
        Readable(paths[start:], transform), batch_size, num_workers=workers,
        collate_fn=lambda batch: batch,
    )  # fmt: skip
    progress = tqdm(
        total=len(paths), initial=start, desc="encoding images", unit="img", mininterval=1,
        leave=False, file=sys.stdout,
    )  # fmt: skip
    for batch in todo:
        good = [place for place, (image, _) in enumerate(batch) if image is not None]
        if good:
            images = torch.stack([batch[place][0] for place in good])
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            with fast_precision(device):
                pooled = encoder.pool(images).half().cpu().numpy()
            rows[state["done"] + np.array(good)] = pooled
        for place, (image, why) in enumerate(batch):
            if image is None:
                state["bad"][state["done"] + place] = why
        state["done"] += len(batch)
        progress.update(len(batch))
        if state["done"] - saved >= SAVE_EVERY or state["done"] == len(paths):
            rows.flush()  # first the features, then the claim that they are there
            write_note(note, state)
            saved = state["done"]
    progress.close()
    encoder.train(was_training)


def fast_precision(device):
    """bfloat16 autocast where the hardware multiplies it faster than float32, else no change."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        fast = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    else:
        fast = False
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def find_bad_images(paths, transform, workers=0) -> dict[int, str]:
    """{row: reason} for the images that cannot be read: looks at each one of them."""
    looked = DataLoader(Readable(paths, transform), None, num_workers=workers)
    bar = tqdm(looked, "checking images", unit="img", mininterval=1, leave=False, file=sys.stdout)
    return {row: why for row, (_, why) in enumerate(bar) if why}


def write_note(path, state):
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state))
    os.replace(part, path)


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


def fingerprint(encoder, paths, transform) -> str:
    """A short name for (weights, transform, images): other input, other name."""
    digest = hashlib.sha256()
    for name, tensor in encoder.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    digest.update(repr(transform).encode())
    for path in paths:
        status = path.stat() if path.exists() else None
        facts = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(f"{path.parent.name}/{path.name}{facts}".encode())
    return digest.hexdigest()[:16]
