"""How fast is every stage, and how much faster than the classic captioning loop?

    python benchmarks/bench.py                                   # on random data, 8 minutes
    python benchmarks/bench.py --images photos --captions captions.json
    python benchmarks/bench.py --quick                           # does it run? no meaningful number
    python benchmarks/bench.py --coco                            # instead: a dataset of COCO's size

Prints a table and writes it to `--out`: bench.json and scaling.png, or coco.json. This project and
the classic loop (classic.py) run in short interleaved rounds whose medians are compared, so that
other load on the machine slows down both. Runs on the GPU if there is one. Each row states the
precision of this project's side; the classic loop computes in float32.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

# The project's modules are one folder up, where `python benchmarks/bench.py` does not search.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch
from coco_size import coco
from measure import (
    compare,
    compare_with_peak,
    forward_flops,
    fraction_of_limit,
    make_row,
    memory_rows,
    padding_row,
    precision_of,
    progress,
    timed,
    training_flops,
)
from random_data import write_random_captions, write_random_data
from setting import Setting, data, training_run
from stages import STAGES, decoding, encoder_forward, int8_name, reward_share, training, vocabulary

EPOCHS = 10  # of the whole run that is extrapolated
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "nltk")


def main(arguments=None):
    args = parse(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        setting, source = prepare(args, folder)
        report = {"machine": machine(), "data": source}
        print(describe(report), flush=True)
        report |= coco(setting, args.quick) if args.coco else all_stages(setting, args.quick)
    print("\n" + describe(report) + "\n\n" + table(report["rows"]))
    file = out / ("coco.json" if args.coco else "bench.json")
    file.write_text(json.dumps(report, indent=2))
    print(f"\nWritten: {file}", end="")
    if "scaling" in report:
        plot_scaling(report["scaling"], out / "scaling.png")
        print(f", {out / 'scaling.png'}", end="")
    print()


def parse(arguments):
    parser = argparse.ArgumentParser(description="Compare every stage with the classic loop.")
    parser.add_argument("--images", help="folder of images; without it, random images and captions")
    parser.add_argument("--captions", help="their captions, a JSON file in COCO's format")
    parser.add_argument("--backbone", default="resnet50", help="any torchvision network")
    parser.add_argument("--weights", default="none", help="torchvision's name, a file, or none")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--inject", default="par", help="with --coco: how the image enters")
    parser.add_argument("--coco", action="store_true", help="instead: random data of COCO's size")
    parser.add_argument("--out", default="runs/bench", help="folder for the results")
    args = parser.parse_args(arguments)
    if bool(args.images) != bool(args.captions):
        parser.error("--images and --captions go together")
    return args


def prepare(args, folder):
    """(the Setting, a description of its data); random data is written to `folder`."""
    if args.images:
        images, captions = args.images, args.captions
        source = f"{Path(args.captions).name}, with its images"
    else:
        progress("writing random images and captions")
        images, captions = write_random_data(folder, args.quick)
        source = "random images of 640x480 pixels, random captions of COCO's lengths"
    weights = None if args.weights.lower() == "none" else args.weights
    inject = args.inject if args.coco else "par"
    setting = Setting(folder, images, captions, args.backbone, weights, inject)
    if args.quick:
        setting = replace(setting, batch_size=4, tokenized=1_000, decoded=16)
        source += "; tiny sizes, the numbers are meaningless"
    return setting, source


def all_stages(setting, quick):
    """Measure everything; the parts of the report."""
    seconds = 0.1 if quick else 1
    first = ("vocabulary, first start", "vocabulary, later starts", "image pipeline")
    rows = [compare(setting, stage, seconds) for stage in first]
    rows += feature_rows(setting, seconds)
    rows += training_rows(setting, seconds)
    rows += [compare(setting, stage, seconds) for stage in ("greedy decoding", "beam 3 decoding")]
    rows += whole_runs(setting, rows)
    extraction_rate = next(row["ours"] for row in rows if row["stage"] == "feature extraction")
    sizes = (100, 200) if quick else (1_000, 2_000, 4_000, 6_000)
    costs = scaling(setting, sizes, seconds, extraction_rate)
    rows += memory_rows(setting)
    return {"rows": rows, "scaling": costs}


def feature_rows(setting, seconds):
    flops = forward_flops(setting)
    forward = compare_with_peak(setting, "encoder forward", seconds, lambda _: flops)
    work = encoder_forward(setting)

    def forward_alone(seconds):
        count = max(round(seconds * forward["ours"]), work.smallest)
        return timed(work.run, count, setting.device)[0]

    # Three rounds, because each is long.
    whole = compare(setting, "feature extraction", seconds, rounds=3, limit=forward_alone)
    whole["of_limit"] = fraction_of_limit(whole)
    whole["note"] = "limit: the encoder's forward pass alone, interleaved"
    rows = [forward, whole]
    if setting.device.type == "cpu" and int8_name(setting.backbone):
        rows.append(compare(setting, "feature extraction, int8", seconds, rounds=3))
        rows[-1]["note"] = f"--backbone {int8_name(setting.backbone)}"
    return rows


def training_rows(setting, seconds):
    """In the project's default precision, and in float32 too where that is another one."""
    rows = []
    for stage, precision in (("training step", "auto"), ("training step, float32", "float32")):
        if rows and precision_of(setting, stage) == rows[0]["precision"]:
            continue
        run = training_run(setting, precision)
        rows.append(
            compare_with_peak(setting, stage, seconds, lambda n, run=run: training_flops(run, n))
        )
    return [
        *rows,
        compare(setting, "training step, cached", seconds),
        attend_row(setting, seconds, rows[0]),
        reward_row(setting),
        padding_row(training_run(setting)),
    ]


def attend_row(setting, seconds, par):
    """Training with attention, interleaved with training with par injection."""
    work = STAGES["training step"].ours(setting)

    def par_alone(seconds):
        batches = round(seconds * par["ours"] / setting.batch_size)
        return timed(work.run, max(batches, work.smallest), setting.device)[0]

    row = compare(setting, "training step, attend", seconds, limit=par_alone)
    row["of_limit"] = fraction_of_limit(row)
    row["note"] = "limit: the training step of par injection, interleaved"
    return row


def reward_row(setting):
    progress("self-critical step")
    return make_row(
        "reward, of a self-critical step",
        "%",
        100 * reward_share(setting),
        note="attend, five samples of 20 words per image",
    )


# ---------------------------------------------------------------------------- the whole run


def whole_runs(setting, rows):
    """Minutes of a whole run, extrapolated from the measured rates; without validation."""
    images, captions = len(data(setting)), len(data(setting).all_captions)
    rate = {row["stage"]: row for row in rows}

    def minutes(side, extraction=0.0):
        seconds = captions / rate["vocabulary, first start"][side] + extraction
        return (seconds + EPOCHS * captions / rate["training step"][side]) / 60

    runs, other = [], minutes("classic")
    for stage in ("feature extraction", "feature extraction, int8"):
        if stage in rate:
            ours = minutes("ours", images / rate[stage]["ours"])
            runs.append(
                make_row(
                    f"whole run, {EPOCHS} epochs{stage.removeprefix('feature extraction')}",
                    "minutes",
                    ours,
                    other,
                    other / ours,
                    rate["training step"]["precision"],
                    note=f"extrapolated: {images:,} images, {captions:,} captions",
                )
            )
    cached = captions / rate["vocabulary, first start"]["classic"]
    cached += images / rate["feature extraction"]["classic"]
    cached += EPOCHS * captions / rate["training step, cached"]["classic"]
    ours = runs[0]["ours"]
    runs.append(
        make_row(
            "whole run, classic loop with cached features",
            "minutes",
            ours,
            cached / 60,
            cached / 60 / ours,
            runs[0]["precision"],
            note="what caching alone would bring",
        )
    )
    return runs


def scaling(setting, sizes, seconds, extraction_rate):
    """Seconds that each stage takes for so many images, five captions each.

    The vocabulary is built. Feature extraction follows from the rate measured before, an epoch from
    a few batches of that size's own loader, decoding from 128 of its images.
    """
    costs = {
        "vocabulary": [],
        "feature extraction (estimated)": [],
        "one epoch (extrapolated)": [],
        "beam 3 decoding (extrapolated)": [],
    }
    for size in sizes:
        progress(f"scaling: {size:,} images")
        file = Path(setting.folder) / f"captions-{size}.json"
        write_random_captions(file, size)
        this = replace(setting, images=setting.folder, captions=str(file), tokenized=5 * size)
        rates = []
        for work in (vocabulary(False, this), training("auto", this), decoding(3, this, 128)):
            first, took = timed(work.run, work.smallest, this.device)
            count = min(max(round(work.smallest * seconds / took), work.smallest), work.largest)
            rates.append(max(first, timed(work.run, count, this.device)[0]))
        words, steps, beams = rates
        spent = (5 * size / words, size / extraction_rate, 5 * size / steps, size / beams)
        for cost, value in zip(costs.values(), spent, strict=True):
            cost.append(value)
    return {"images": list(sizes), "seconds": costs}


# ---------------------------------------------------------------------------- the report


def machine():
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def describe(report):
    """The machine and the data in two lines."""
    facts = {name: fact for name, fact in report["machine"].items() if fact is not None}
    facts["load"] = f"{facts['load']:.1f} at the start" if "load" in facts else "unknown"
    return ", ".join(f"{name} {fact}" for name, fact in facts.items()) + f"\ndata: {report['data']}"


def table(rows):
    head = ("stage", "precision", "this project", "classic", "", "ratio", "of limit", "")
    lines = [head, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (2, 3, 5, 6) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cells(row):
    ratio = f"{number(row['ratio'])}x" if row["ratio"] else ""
    fraction = f"{row['of_limit']:.0%}" if row["of_limit"] else ""
    return (
        row["stage"],
        row["precision"] or "",
        number(row["ours"]),
        number(row["classic"]),
        row["unit"],
        ratio,
        fraction,
        row["note"],
    )


def number(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_scaling(costs, path):
    matplotlib.use("Agg")  # renders to a file, without a display
    import matplotlib.pyplot as plt

    from captioning.figures.plots import curves

    ax = plt.subplots(figsize=(9, 4), layout="constrained")[1]
    curves(costs["seconds"], ax, xlabel="images", ylabel="seconds", x=costs["images"])
    ax.set(xscale="log", yscale="log", title="Cost by number of images, five captions each")
    ax.set_xticks(costs["images"], [f"{size:,}" for size in costs["images"]], minor=False)
    ax.minorticks_off()
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
