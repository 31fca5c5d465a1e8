"""A made-up training set of COCO's size: from "the features exist" to training, and its memory.

report = coco(setting, quick=False)      # as `bench.py --coco` does
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from made_data import write_captions, write_features
from measure import alone, peak_memory, progress, timed
from stages import encoder, new_trainer

import train

COCO = {"images": 123_287, "captions": 616_767, "words": 10_000}
PHASES = ((train, "CaptionData"), (train, "pack"), (train, "build_model"),
          (train, "get_loader"))  # fmt: skip


def coco(setting, quick):
    """From "the features exist" to training, for as many images and captions as COCO has."""
    size = {"images": 1_000, "captions": 5_003, "words": 1_000} if quick else COCO
    images, folder = size["images"], Path(setting.folder)
    progress(f"making up {size['captions']:,} captions, and the features of {images:,} images")
    write_captions(folder / "coco.json", **size)
    write_features(folder / f"features-{images}.npy", images, encoder(setting).feature_size)
    setting = replace(setting, images=str(folder), captions=str(folder / "coco.json"))
    progress("a process of its own reads them and trains")
    rows = alone(coco_run, setting, 20 if quick else 100)
    return {"rows": [plain_row(*row) for row in rows]}


def coco_run(setting, steps):
    """(stage, unit, value, note) of each phase; on a GPU `steps` is a whole epoch."""
    laps = {}
    start = time.perf_counter()
    with contextlib.ExitStack() as watches:
        for owner, name in PHASES:
            watches.enter_context(stopwatch(owner, name, laps))
        run = new_trainer(setting)
    built = time.perf_counter() - start
    run.last_batches(run.options.accumulate)
    ready, memory = time.perf_counter() - start, peak_memory()
    epoch = len(run.train_loader)
    steps = epoch if setting.device.type == "cuda" else min(steps, epoch)
    rate, seconds = timed(run.last_batches, steps, setting.device)
    captions = len(run.train_loader.dataset)
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
    return [
        *((f"  {name}", "s", lap, "") for name, lap in laps.items()),
        ("first optimizer step", "s", ready - built, ""),
        ("start to first step, in all", "s", ready, f"{captions:,} captions"),
        ("peak memory by then", "MB", memory, ""),
        ("training", "captions/s", rate, f"{steps:,} of {epoch:,} batches, {seconds:.0f} s"),
        ("one epoch", "minutes", captions / rate / 60,
         "measured" if steps == epoch else "extrapolated"),
        ("peak memory", "MB", peak_memory(), "with the pages read of the mapped features"),
        *([("peak memory of the GPU", "MB", gpu, "")] if gpu else []),
    ]  # fmt: skip


@contextlib.contextmanager
def stopwatch(owner, name, laps):
    """Add up in `laps` the seconds that `owner.name` takes whenever it is called."""
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            laps[name] = laps.get(name, 0.0) + time.perf_counter() - start

    with mock.patch.object(owner, name, watched):
        yield


def plain_row(stage, unit, value, note):
    return {"stage": stage, "unit": unit, "ours": value, "classic": None, "ratio": None,
            "of_limit": None, "note": note}  # fmt: skip
