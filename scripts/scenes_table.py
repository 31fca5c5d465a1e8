"""Train and evaluate the rows of the README's table of synthetic scenes, and print the table.

    python scripts/scenes_table.py    # par and attend, three seeds: six minutes on one core
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

from captioning.data.coco import CocoCaptions
from captioning.data.features import extract_features
from captioning.data.splits import prepare_splits
from captioning.learning.options import config_for
from captioning.learning.run import build_run
from captioning.networks.layers import eval_mode
from captioning.scenes.attention import attention_on_things
from captioning.scenes.dataset import generate_scenes
from captioning.scenes.mistakes import is_wrong
from data_loader import image_loader
from evaluate import caption_dataset, score
from model import CaptionModel
from train import fit

# The CNN of the scenes was trained with images of 96 pixels, whose last map has only 3 x 3
# positions. With larger images the map is finer, but the features are worse.
ROWS = {"par": {}, "attend": {"inject": "attend", "image_size": 128}}
COLUMNS = {
    "exactly right": "{:.1%}",
    "BLEU-4": "{:.1%}",
    "CIDEr-D": "{:.2f}",
    "val perplexity": "{:.3f}",
    "attention": "{:.1%}",
    "untrained": "{:.1%}",
    "uniform": "{:.1%}",
}


def attention_shares(model, data, features) -> np.ndarray:
    """The means over the nouns of the part of the attention, and of the image, in the box of the
    named object: shape (2,).
    """
    scenes = {number: scene for split, number, scene, _ in generate_scenes() if split == "test"}
    found = []
    for images, rows in image_loader(data, features=features, batch_size=50):
        captions = [data.captions[row][0] for row in rows]
        ids = [torch.tensor(model.vocab.encode(caption)) for caption in captions]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (B, T)
        with torch.no_grad(), eval_mode(model), model.autocast():
            memory = model.encode(images, precomputed=True)
            _, _, attention = model.decoder.hidden(tokens[:, :-1], None, memory)  # (B, T-1, P)
        side = round(attention.size(2) ** 0.5)
        maps = attention.float().numpy().reshape(*attention.shape[:2], side, side)
        for row, caption, of_words in zip(rows.tolist(), ids, maps, strict=True):
            text = " ".join(model.vocab.words[index] for index in caption[1:].tolist())
            found += attention_on_things(text, of_words, scenes[data.image_ids[row]])
    return np.array(found).mean(0)


def result(args, row, seed) -> dict:
    """The values of COLUMNS for a run, which is trained."""
    splits = prepare_splits("synthetic", args.data)
    config = config_for(
        "synthetic",
        splits,
        f"{args.out}/{row}-{seed}",
        **ROWS[row],
        seed=seed,
        cache_dir=args.cache_dir,
        overwrite=True,
    )
    run, test = build_run(config), CocoCaptions(*splits["test"])
    extracted = extract_features(run.model.encoder, test.paths, run.model.transform, args.cache_dir)
    if row == "attend":
        untrained, uniform = attention_shares(run.model, test, extracted.features)
    history = fit(run)
    model = CaptionModel.from_checkpoint(f"{config.out}/best.pt")
    captions = caption_dataset(model, test, features=extracted.features)
    right = [not is_wrong(c, true[0]) for c, true in zip(captions, test.captions, strict=True)]
    values = {
        "exactly right": np.mean(right),
        **score(captions, test, model.vocab),
        "val perplexity": min(line["val_perplexity"] for line in history),
    }
    if row == "attend":
        trained, _ = attention_shares(model, test, extracted.features)
        values |= {"attention": trained, "untrained": untrained, "uniform": uniform}
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
