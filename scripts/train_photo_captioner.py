"""Train photo_captioner.pt, the model that `CaptionModel.pretrained` and caption.py load.

    python scripts/train_photo_captioner.py --data flickr8k.json --out runs/photo_captioner

`--data` is the JSON file of results_table.py, with the weights of EfficientNet-Lite2 among its
encoders. Trains the row self-critical of that table after those that it starts from, scores it with
a beam of 5, and exports it with a model card. The command continues after an interruption.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from results_table import metrics_of, result, run_folder

from captioning.base.checkpoints import export

ENCODER = "timm/tf_efficientnet_lite2"
ROW = "self-critical"
CARD = {
    "summary": (
        "trained on 6,091 Flickr8k photographs of people, dogs, sport and outdoor scenes; knows "
        "little else; for research use only"
    ),
    "command": "python scripts/train_photo_captioner.py --data flickr8k.json",
    "licence": "research use only, because of the terms of the Flickr8k photographs",
    "limitations": (
        "Names animals, sports, clothes and places of Flickr8k in whatever it is shown: other "
        "animals become dogs, indoor scenes and objects are mostly wrong, and text is not read. "
        "Counts above two, colours and genders are often wrong. Captions repeat the biases of "
        "their authors. The perplexity is high, because the last stage of training maximized "
        "CIDEr-D instead of the likelihood: do not use the probabilities as confidence."
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="JSON file with the paths")
    parser.add_argument("--out", default="runs/photo_captioner", help="folder of the runs")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="photo_captioner.pt", help="the file to write")
    args = parser.parse_args()
    args.data = json.loads(Path(args.data).read_text())
    result(args, ENCODER, ROW, args.seed)
    best = run_folder(args, ENCODER, ROW, args.seed) / "best.pt"
    export(best, args.target, CARD)  # in half precision, so that the scores differ a little
    metrics = metrics_of(args, [args.target])
    names = ("images", "beam_size", "perplexity", "BLEU-4", "CIDEr-D", "distinct")
    export(best, args.target, CARD | {"validation": {name: metrics[name] for name in names}})
    print(f"{args.target}: CIDEr-D {metrics['CIDEr-D']:.3f}, BLEU-4 {metrics['BLEU-4']:.3f}")


if __name__ == "__main__":
    main()
