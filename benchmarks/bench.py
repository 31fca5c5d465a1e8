"""How fast is every stage, and how much faster than the classic captioning loop?

    python benchmarks/bench.py                              # about ten minutes
    python benchmarks/bench.py --against ../other           # than another checkout instead
    python benchmarks/bench.py --images 123287 --stages start training     # with COCO's size
    python benchmarks/bench.py --images 300 --seconds 0 --rounds 1         # does it run?

Prints a Markdown table. This project (stages.py) and the other side (classic.py, or stages.py of
the other checkout) run in short alternating rounds in two processes, so that other load on the
machine slows down both. A rate is the median over the rounds, and a ratio the median, and in
parentheses the range, of the ratios within the rounds. The data are random images of 640x480 pixels
and random captions of COCO's lengths, the CNN is ResNet50 with random weights. Runs on the GPU if
there is one; this project in its default precision, the classic loop in float32.
"""

import argparse
import os
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from random_data import write_data
from rounds import ask, start

HERE = Path(__file__).resolve().parent
# Each stage of this project, and that of the classic loop to compare it with, if there is one.
STAGES = [
    ("images", "images"),
    ("extraction", "extraction"),
    ("start", None),
    ("loader", None),
    ("loader-attend", None),
    ("training", "training"),
    ("training", "training-cached"),
    ("training-attend", "training"),
    ("validation", None),
    ("validation-attend", None),
    ("captioning", "captioning"),
    ("captioning-attend", "captioning"),
]
EPOCHS = 10  # of the whole run that is extrapolated


def measure(stage, script, other, data, args):
    """(the median rates, the ratio in each round, the memory of this project in MB)."""
    commands = [(HERE / "stages.py", stage), *([(script, other)] if script else [])]
    with ExitStack() as stack:
        enter = stack.enter_context
        sides = [enter(start(*x, data, enter(TemporaryDirectory(dir=data)))) for x in commands]
        answers = [[ask(side, args.seconds) for side in sides] for _ in range(args.rounds)]
    rates = [[answer["rate"] for answer in answered] for answered in answers]
    ratios = [ours / other for ours, *others in rates for other in others]
    return [median(side) for side in zip(*rates, strict=True)], ratios, answers[-1][0]["memory"]


def as_line(stage, other, rates, ratios, memory):
    name = stage if other in (stage, None) else f"{stage}, and {other}"
    ours, theirs = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in [*rates, 0][:2])
    items = "images" if stage.startswith(("images", "extraction", "captioning")) else "captions"
    ratio = f"{median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})" if ratios else ""
    return f"| {name} | {ours} {items}/s | {theirs if ratios else ''} | {ratio} | {memory:,.0f} |"


def whole_run(rates, images):
    """Text about the minutes of a whole run without validation, extrapolated from the rates."""
    cnn, cnn_2 = (images / rate for rate in rates["extraction", "extraction"])  # seconds
    captions = EPOCHS * 5 * images
    steps, steps_2 = (captions / rate for rate in rates["training", "training"])
    caching = cnn_2 + captions / rates["training", "training-cached"][1]
    ours = cnn + steps
    return (
        f"{EPOCHS} epochs of {5 * images:,} captions (extrapolated): {ours / 60:.1f} minutes; "
        f"the classic loop {steps_2 / 60:.1f} ({steps_2 / ours:.3g} times as long), with cached "
        f"features {caching / 60:.1f} ({caching / ours:.3g} times as long)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", help="another checkout, or a script with its stages")
    parser.add_argument("--stages", nargs="+", choices=dict(STAGES), default=list(dict(STAGES)))
    parser.add_argument("--images", type=int, default=6_091, help="of training, 5 captions each")
    parser.add_argument("--seconds", type=float, default=2, help="least duration of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pairs = [(ours, other and HERE / "classic.py", other) for ours, other in STAGES]
    if args.against:
        path = Path(args.against)
        path = path / "benchmarks" / "stages.py" if path.is_dir() else path
        if not path.is_file():
            parser.error(f"there is no file {path}, which --against needs")
        pairs = [(stage, path, stage) for stage in dict(STAGES)]
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS {threads}, torch {version('torch')}\n")
    print("| stage | this project | other | ratio | MB |\n|---|---|---|---|---|", flush=True)
    rates = {}
    with TemporaryDirectory() as data:
        write_data(data, args.images)
        for stage, script, other in pairs:
            if stage in args.stages:
                rates[stage, other], *rest = measure(stage, script, other, data, args)
                print(as_line(stage, other, rates[stage, other], *rest), flush=True)
    if not args.against and args.stages == list(dict(STAGES)):
        print("\n" + whole_run(rates, args.images))


if __name__ == "__main__":
    main()
