"""A random training set of COCO's size: from computed features to training, and its memory.

report = coco(setting, quick=False)      # as `bench.py --coco` does
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from measure import make_row, peak_memory, progress, run_in_new_process, timed
from random_data import write_random_captions
from setting import cache_random_features, train_config
from stages import train_last_batches

from captioning.learning import run as run_module

COCO = {"images": 123_287, "captions": 616_767, "words": 10_000}
PHASES = ("CocoCaptions", "tokenize_all", "CaptionModel", "extract_features", "train_loader")


def coco(setting, quick):
    """From computed features to training, with as many images and captions as COCO has."""
    size = {"images": 1_000, "captions": 5_003, "words": 1_000} if quick else COCO
    captions = Path(setting.folder) / "coco.json"
    progress(f"writing {size['captions']:,} captions, and features of {size['images']:,} images")
    write_random_captions(captions, **size)
    setting = replace(setting, images=setting.folder, captions=str(captions))
    run_in_new_process(cache_random_features, train_config(setting))
    for cached in Path(setting.folder).glob("captions-*.npz"):
        cached.unlink()  # the first start tokenizes the captions
    progress("a new process reads them and trains")
    return {"rows": run_in_new_process(coco_run, setting, 20 if quick else 100)}


def coco_run(setting, steps):
    """A row per phase of the start, then those of the training; on a GPU `steps` is an epoch."""
    seconds_of = {}
    start = time.perf_counter()
    with contextlib.ExitStack() as stopwatches:
        for name in PHASES:
            stopwatches.enter_context(stopwatch(run_module, name, seconds_of))
        run = run_module.build_run(train_config(setting))
    built = time.perf_counter() - start
    train_last_batches(run, run.config.batches_per_update)
    ready, memory = time.perf_counter() - start, peak_memory()
    epoch, captions = len(run.train_loader), len(run.train_loader.dataset)
    steps = epoch if setting.device.type == "cuda" else min(steps, epoch)
    rate, seconds = timed(lambda count: train_last_batches(run, count), steps, setting.device)
    rows = [
        *(make_row(f"  {name}", "s", seconds) for name, seconds in seconds_of.items()),
        make_row("first optimizer step", "s", ready - built, precision=run.precision),
        make_row("start to first step, in total", "s", ready, note=f"{captions:,} captions"),
        make_row("peak memory by then", "MB", memory),
        make_row(
            "training",
            "captions/s",
            rate,
            precision=run.precision,
            note=f"{steps:,} of {epoch:,} batches, {seconds:.0f} s",
        ),
        make_row(
            "one epoch",
            "minutes",
            captions / rate / 60,
            precision=run.precision,
            note="measured" if steps == epoch else "extrapolated",
        ),
        make_row("peak memory", "MB", peak_memory()),
    ]
    if torch.cuda.is_available():
        rows.append(
            make_row("peak memory of the GPU", "MB", torch.cuda.max_memory_allocated() / 2**20)
        )
    return rows


@contextlib.contextmanager
def stopwatch(owner, name, seconds_of):
    """Add up in `seconds_of` the time that `owner.name` takes whenever it is called."""
    function = getattr(owner, name)

    def timed_function(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds_of[name] = seconds_of.get(name, 0.0) + time.perf_counter() - start

    with mock.patch.object(owner, name, timed_function):
        yield
