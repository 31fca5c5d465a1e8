"""Train and evaluate the rows of the table in docs/scenes.md, and print the table.

    python scripts/scenes_table.py    # all rows, three seeds: nine minutes on one core
    python scripts/scenes_table.py --seeds 0 --rows attend

Captions are generated for the test scenes with a beam of 3. For `attend`, the command also prints
which part of the attention falls within the box of an object when its noun is predicted, in the
actual captions of the test scenes: for the trained model, the untrained one, and uniform attention.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from results_table import format_cells

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.base.modules import eval_mode, select
from captioning.data.coco import CocoCaptions
from captioning.data.splits import prepare_splits
from captioning.learning.train_config import config_for
from captioning.scenes.attention_on_things import attention_on_things
from captioning.scenes.generation import generate_scenes
from captioning.scenes.mistakes import is_wrong
from captioning.scoring.evaluation import caption_split, score
from data_loader import CaptionDataset, ImageDataset, get_loader
from evaluate import features_of
from model import CaptionModel
from train import build_run, fit

MAP = {"image_size": 256, "weights": "captioning/scenes/map_encoder.pt"}  # a map of 8 x 8 positions
ROWS = {"par": {}, "par, CNN of attend": MAP, "attend": {"inject": "attend"} | MAP}
COLUMNS = {
    "exactly right": "{:.1%}",
    "BLEU-4": "{:.1%}",
    "CIDEr-D": "{:.2f}",
    "val perplexity": "{:.3f}",
    "attention": "{:.1%}",
    "untrained": "{:.1%}",
    "uniform": "{:.1%}",
}


@torch.no_grad()
def attention_shares(model, data, features) -> np.ndarray:
    """(2,) the mean parts of the attention, and of the image, in the box of a named object.

    Over the nouns of the first caption of each scene in `data`.
    """
    scenes = {number: scene for split, number, scene, _ in generate_scenes() if split == "test"}
    scenes, found = iter([scenes[number] for number in data.image_ids]), []
    captions = CaptionDataset(data, model.vocab, features=features)
    first = np.flatnonzero(np.diff(captions.image_rows, prepend=-1))
    for batch in get_loader(torch.utils.data.Subset(captions, first), "val", 50):
        with eval_mode(model), model.autocast():
            memory = model.decoder.memory(model.encode(features=batch.features))
            memory = select(memory, batch.image_index)
            _, _, attention = model.decoder.run_lstms(batch.captions[:, :-1], None, memory)
        side = round(attention.size(2) ** 0.5)
        maps = attention.float().unflatten(2, (side, side)).numpy()  # (B, T-1, side, side)
        for ids, of_words in zip(batch.captions.tolist(), maps, strict=True):
            found += attention_on_things(model.vocab.decode(ids), of_words, next(scenes))
    return np.array(found).mean(0)


def result(args, row, seed) -> dict:
    """The values of COLUMNS for a run, which is trained."""
    splits, out = prepare_splits("synthetic", args.data), f"{args.out}/{row}-{seed}"
    options = {**ROWS[row], "seed": seed, "cache_dir": args.cache_dir, "overwrite": True}
    run = build_run(config_for("synthetic", splits, out, **options))
    test = CocoCaptions(*splits["test"])
    features = features_of(run.model, test, args.cache_dir)
    values = {}
    if row == "attend":
        values["untrained"], values["uniform"] = attention_shares(run.model, test, features)
    history = fit(run)
    model = CaptionModel.from_checkpoint(f"{out}/best.pt")
    if row == "attend":
        values["attention"], _ = attention_shares(model, test, features)
    captions = caption_split(model, ImageDataset(test, features=features))
    right = [not is_wrong(c, true[0]) for c, true in zip(captions, test.captions, strict=True)]
    values |= score(captions, test, model.vocab)
    values["exactly right"] = np.mean(right)
    values["val perplexity"] = min(line["val_perplexity"] for line in history)
    return {name: float(values[name]) for name in COLUMNS if name in values}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/synthetic", help="folder of the scenes")
    parser.add_argument("--out", default="runs/scenes", help="folder of the runs")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    results = {row: [result(args, row, seed) for seed in args.seeds] for row in args.rows}
    print(f"| model | seeds | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    for row, of_seeds in results.items():
        print(f"| {row} | {len(of_seeds)} | {format_cells(of_seeds, COLUMNS)} |")


if __name__ == "__main__":
    main()
