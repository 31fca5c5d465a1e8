"""Train and evaluate every row of the results table in docs/flickr8k.md, and print the table.

    python scripts/results_table.py --data flickr8k.json --out runs/table
    python scripts/results_table.py --data flickr8k.json --out runs/table --rows par attend
    python scripts/results_table.py --data flickr8k.json --out runs/table --dry-run

`--data` is a JSON file with the paths of a dataset and of the encoders' weights:

    {"train_images": "flickr8k/images", "train_captions": "flickr8k/captions_train.json",
     "val_images": "flickr8k/images", "val_captions": "flickr8k/captions_val.json",
     "encoders": {"mobilenet_v2": "mobilenet_v2.pth",
                  "timm/tf_efficientnet_lite2": "efficientnet_lite2.pth"}}

The weights may also be "DEFAULT", to download them. The same works for COCO's folders. Every row is
one `train.py` command per seed, which `--dry-run` prints. An interrupted row continues, and a
complete one is not trained again: after changing options or data, choose another `--out`. Captions
are generated with a beam of 5.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import train
from captioning.base.files import write_text

SPLITS = ("train_images", "train_captions", "val_images", "val_captions")
BEAM_SIZE = 5
REGULARIZED = (
    "--inject attend --num-heads 8 --dropout 0.5 --feature-dropout 0.5 --label-smoothing 0.1 "
    "--epochs 12 --best-by cider"
)
# Of an option given twice, the last one counts.
SMALL_STEPS = (
    f"{REGULARIZED} --learning-rate 2e-4 --epochs 3 --batch-size 64 --grad-accum-steps 2 "
    "--min-word-freq 5"
)
SELF_CRITICAL = "--inject attend --num-heads 8 --loss self-critical --epochs 8"
# Row: options of train.py, and the row whose model it starts from.
ROWS = {
    "init": ("--inject init", None),
    "pre": ("--inject pre", None),
    "par": ("--inject par", None),
    "attend": (REGULARIZED, None),
    "attend-crops": (f"{REGULARIZED} --crops 3 --epochs 16", None),
    "continued": (SMALL_STEPS, "attend"),
    "fine-tuned": (f"{SMALL_STEPS} --fine-tune last", "attend"),
    "self-critical": (SELF_CRITICAL, "fine-tuned"),
    "ensemble": (None, "self-critical"),
}
COLUMNS = {
    "perplexity": "{:.2f}",
    "BLEU-4": "{:.1%}",
    "CIDEr-D": "{:.3f}",
    "distinct": "{:.0%}",
    "minutes": "{:.0f}",
}


def run_folder(args, encoder, row, seed) -> Path:
    return Path(args.out) / f"{encoder.replace('/', '-')}-{row}-{seed}"


def train_command(args, encoder, row, seed) -> list[str]:
    """The arguments of train.py for a row."""
    options, base = ROWS[row]
    flags = {f"--{name.replace('_', '-')}": args.data[name] for name in SPLITS}
    flags |= {"--backbone": encoder, "--weights": args.data["encoders"][encoder]}
    flags |= {"--seed": seed, "--cache-dir": args.cache_dir}
    if base:
        flags["--init-from"] = run_folder(args, encoder, base, seed) / "best.pt"
    flags["--out"] = run_folder(args, encoder, row, seed)
    words = [str(word) for flag in flags.items() for word in flag]
    return [*words, "--flip", "--resume", *options.split()]


def metrics_of(args, checkpoints) -> dict:
    """What evaluate.py computes for one checkpoint, or for the ensemble of several."""
    command = [checkpoints[0], args.data["val_images"], "--captions", args.data["val_captions"]]
    command += ["--cache-dir", args.cache_dir, "--beam-size", BEAM_SIZE]
    if checkpoints[1:]:
        command += ["--ensemble", *checkpoints[1:]]
    return evaluate.run(evaluate.parse_args([str(word) for word in command]))


def result(args, encoder, row, seed) -> dict:
    """The metrics of a run, which is trained, and before it the row that it starts from.

    row.json in its folder contains the metrics of a complete run.
    """
    folder = run_folder(args, encoder, row, seed)
    file = folder / "row.json"
    if file.is_file():
        return json.loads(file.read_text())
    if ROWS[row][1]:
        result(args, encoder, ROWS[row][1], seed)
    if train.main(train_command(args, encoder, row, seed)):
        raise SystemExit(f"{row} with seed {seed} is not complete; see the message above")
    metrics = metrics_of(args, [folder / "best.pt"])
    history = [json.loads(line) for line in (folder / "history.jsonl").open()]
    metrics["minutes"] = sum(line.get("seconds", 0) for line in history) / 60
    write_text(file, json.dumps(metrics))
    return metrics


def results_of(args, encoder, row) -> list[dict]:
    """The metrics of a row for each seed; for "ensemble", those of the models of all seeds."""
    base = ROWS[row][1] if row == "ensemble" else row
    results = [result(args, encoder, base, seed) for seed in args.seeds]
    if row != "ensemble":
        return results
    checkpoints = [run_folder(args, encoder, base, seed) / "best.pt" for seed in args.seeds]
    minutes = sum(result["minutes"] for result in results)
    return [metrics_of(args, checkpoints) | {"minutes": minutes}]


def format_cells(results, columns=COLUMNS) -> str:
    """Cells of a Markdown table: the mean and, of several results, the range of each column."""
    cells = []
    for name, template in columns.items():
        values = [result[name] for result in results if name in result]
        cell = template.format(statistics.mean(values)) if values else ""
        if len(values) > 1 and name != "minutes":
            cell += f" ({template.format(min(values))} to {template.format(max(values))})"
        cells.append(cell)
    return " | ".join(cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="JSON file with the paths, see above")
    parser.add_argument("--out", default="runs/table", help="folder of the runs")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args()
    args.data = json.loads(Path(args.data).read_text())
    rows = list(itertools.product(args.data["encoders"], args.rows))
    if args.dry_run:
        trained = [(encoder, row) for encoder, row in rows if row != "ensemble"]
        for (encoder, row), seed in itertools.product(trained, args.seeds):
            print("python train.py", *train_command(args, encoder, row, seed))
        return
    lines = [f"| encoder | model | seeds | {' | '.join(COLUMNS)} |"]
    lines.append("|---" * (3 + len(COLUMNS)) + "|")
    for encoder, row in rows:
        results = results_of(args, encoder, row)
        lines.append(f"| {encoder} | {row} | {len(args.seeds)} | {format_cells(results)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
