"""Train photo_captioner.pt, the model that `CaptionModel.pretrained` and caption.py load.

    python scripts/train_photo_captioner.py --data data --weights efficientnet_lite2.pth

`--data` is a folder that contains caption_text.txt (captions without photographs, one per line) and
two folders, flickr8k and coco, with images/ and annotations/captions_{train,val}.json in each.

First the decoder is trained as a language model, on caption_text.txt, then with the photographs of
both folders. The model of the last epoch is kept, in which the learning rate has fallen to zero. It
gets a detector of words, which learns from imagenet_words.json which classes of ImageNet a word
names, and its confidence is calibrated on the validation photographs of both folders. Three other
models, trained on the same photographs, are compared with it in a history, which the notebooks
show. The command continues after an interruption.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import train
from captioning.base.checkpoints import export, load_safely, save
from captioning.base.files import write_text
from captioning.base.tokens import tokenize
from captioning.data.coco import CocoCaptions, read_captions
from captioning.figures.nouns import NOUNS
from captioning.learning.loop import fit
from captioning.learning.losses import TeacherForcing
from captioning.learning.optimizer import build_optimizer
from captioning.learning.run import Run
from captioning.networks.word_detector import WordDetector, pooled, word_shares
from captioning.scoring.calibration import calibrate, encode_images
from data_loader import Batch, ImageDataset, get_loader
from model import PRETRAINED, CaptionModel
from vocabulary import Vocabulary

SOURCES = ("flickr8k", "coco")
MODEL = "--backbone timm/tf_efficientnet_lite2 --flip"
ATTEND = "--inject attend --num-heads 8"
TEXT = {"epochs": 3, "batch_size": 192, "grad_accum_steps": 1, "label_smoothing": 0.1}
LONGEST = 24  # words of a caption without photograph; longer ones are left out
HELD_OUT = 200  # one of so many captions without photograph validates the language model
REGULARIZED = "--dropout 0.5 --feature-dropout 0.5 --label-smoothing 0.1 --best-by cider"
CROSS_ENTROPY = (
    f"{REGULARIZED} --crops 3 --learning-rate 1.5e-3 --batch-size 64 --grad-accum-steps 2 "
    "--min-word-freq 5 --epochs 12"
)
COMPARED = {  # with the model of the file
    "init": f"{REGULARIZED} --min-word-freq 5 --epochs 10 --inject init",
    "par": f"{REGULARIZED} --min-word-freq 5 --epochs 10 --inject par",
    "self-critical": f"--loss self-critical --xe-weight 0.2 --crops 3 --epochs 1 {ATTEND}",
}
BEAM_SIZE = 5


def merge(data, split, out) -> Path:
    """Write the captions of both sources as one file, whose images know their source."""
    images, annotations = [], []
    for source in SOURCES:
        content = read_captions(data / source / f"annotations/captions_{split}.json").dataset
        first = len(images) + 1
        ids = {image["id"]: first + i for i, image in enumerate(content["images"])}
        for image in content["images"]:
            name = f"{source}/images/{image['file_name']}"
            images.append({"id": ids[image["id"]], "file_name": name, "source": source})
        for annotation in content["annotations"]:
            text = {"image_id": ids[annotation["image_id"]], "caption": annotation["caption"]}
            annotations.append({"id": len(annotations)} | text)
    path = out / f"captions_{split}.json"
    write_text(path, json.dumps({"images": images, "annotations": annotations}))
    return path


class Texts(torch.utils.data.Dataset):
    """Captions without images: all have the features of one image, which are zeros."""

    def __init__(self, captions, vocab, feature_size):
        self.captions = [torch.tensor(vocab.encode(caption)) for caption in captions]
        self.lengths = np.array([len(ids) for ids in self.captions])
        self.features = torch.zeros(1, 1, feature_size)

    def __len__(self):
        return len(self.captions)

    def __getitems__(self, rows):
        captions = pad_sequence([self.captions[row] for row in rows], batch_first=True)
        image_index = torch.zeros(len(rows), dtype=torch.long)
        return Batch(None, captions, torch.tensor(self.lengths[rows]), image_index, self.features)


def train_language_model(config, text_file):
    """Train the decoder on captions without images, with the vocabulary of the photographs."""
    photographs = CocoCaptions(config.train_images, config.train_captions)
    vocab = Vocabulary.build(photographs.all_captions, config.min_word_freq)
    torch.manual_seed(config.seed)
    model = CaptionModel(vocab, config.model_config(), config.weights)
    texts = [line for line in Path(text_file).read_text().split("\n") if line.strip()]
    texts = [line for line in texts if len(line.split()) <= LONGEST]
    size = model.encoder.cnn.feature_size
    kept = Texts([text for i, text in enumerate(texts) if i % HELD_OUT], vocab, size)
    held_out = Texts(texts[::HELD_OUT], vocab, size)
    train_loader = get_loader(kept, "train", config.batch_size, seed=config.seed)
    loss = TeacherForcing(model, config.label_smoothing)
    optimizer = build_optimizer(model, config)
    fit(Run(config, model, loss, optimizer, train_loader, get_loader(held_out, "val", 512)))


def named_classes(vocab) -> list[tuple[int, int]]:
    """Pairs of a word's index in `vocab` and of a class of ImageNet that it names."""
    table, pairs = json.loads((Path(__file__).parent / "imagenet_words.json").read_text()), []
    for word in table.keys() & vocab.index.keys():
        for part in table[word].split():
            first, _, last = part.partition("-")
            pairs += [(vocab(word), k) for k in range(int(first), int(last or first) + 1)]
    return sorted(pairs)


def fit_detector(model, captions, weights, cache_dir) -> WordDetector:
    """A detector of words, fitted to the training photographs and their captions.

    weights: the file of the CNN's weights, with those of its classifier.
    """
    features = evaluate.features_of(model, captions, cache_dir)
    encoded = torch.cat(
        [pooled(x) for x in encode_images(model, ImageDataset(captions, features=features))]
    )
    state = load_safely(weights)
    classifier = state["classifier.weight"].float(), state["classifier.bias"].float()
    shares = word_shares(model.vocab, captions.captions)
    return WordDetector.fit(encoded, shares, classifier, named_classes(model.vocab))


def train_photographs(command, photos):
    """Train a model on photographs, and caption `photos` after each epoch, in captions.json."""
    config = train.parse_args([*map(str, command)])
    file = Path(config.out, "captions.json")

    def after_epoch(run):
        found = run.model.caption(photos, beam_size=BEAM_SIZE)
        known = json.loads(file.read_text()) if file.exists() else {}
        known[str(run.progress.epoch)] = {p.name: c for p, c in zip(photos, found, strict=True)}
        write_text(file, json.dumps(known))

    fit(train.build_run(config), after_epoch)


def count_nouns(captions) -> dict[str, int]:
    """How many images have one of the words in their captions, for each of the NOUNS."""
    found = [set(tokenize(" ".join(texts))) for texts in captions]
    return {x: sum(not words.isdisjoint(x.split()) for words in found) for x in NOUNS.values()}


def history_of(out, captions) -> dict:
    """The results of each epoch of all runs, captions of the photographs in photos/, and how often
    the training captions name their main objects.
    """

    def lines(name):
        return [json.loads(line) for line in (out / name / "history.jsonl").open()]

    def captions_of(name):
        return json.loads((out / name / "captions.json").read_text())

    last = {name: list(captions_of(name).values())[-1] for name in COMPARED}
    return {
        **{name: lines(name) for name in ("language_model", "photographs")},
        "compared": {name: lines(name) for name in COMPARED},
        "captions": last | {"attend": list(captions_of("photographs").values())[-1]},
        "captions_by_epoch": captions_of("photographs"),
        "counts": count_nouns(captions),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--weights", required=True, help="of EfficientNet-Lite2, a state dict")
    parser.add_argument("--out", type=Path, default=Path("runs/photo_captioner"), help="folder")
    parser.add_argument("--cache-dir", default="runs/cache", help="folder for features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, default=PRETRAINED, help="the file to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = {split: merge(args.data, split, args.out) for split in ("train", "val")}
    flags = ["--seed", args.seed, "--cache-dir", args.cache_dir, "--resume", *MODEL.split()]
    for split, file in files.items():
        flags += [f"--{split}-images", args.data, f"--{split}-captions", file]
    new = [*flags, "--weights", args.weights]

    text, last = args.out / "language_model", args.out / "photographs" / "last.pt"
    command = [*map(str, new), *ATTEND.split(), "--out", str(text)]
    config = replace(train.parse_args(command), **TEXT)
    train_language_model(config, args.data / "caption_text.txt")
    photos = sorted((Path(__file__).parent.parent / "photos").glob("*.jpg"))
    start = [*flags, "--init-from", text / "best.pt", "--out", last.parent, *ATTEND.split()]
    train_photographs([*start, *CROSS_ENTROPY.split()], photos)
    for name, options in COMPARED.items():
        start = [*flags, "--init-from", last] if name == "self-critical" else new
        train_photographs([*start, "--out", args.out / name, *options.split()], photos)

    model = CaptionModel.from_checkpoint(last)
    captions, val_captions = (CocoCaptions(args.data, files[split]) for split in ("train", "val"))
    model.detector = fit_detector(model, captions, args.weights, args.cache_dir)
    features = evaluate.features_of(model, val_captions, args.cache_dir)
    model.confidence = calibrate(model, ImageDataset(val_captions, features=features), BEAM_SIZE)
    save(model.checkpoint(), args.out / "calibrated.pt")
    card = json.loads((Path(__file__).parent / "photo_captioner_card.json").read_text())
    export(args.out / "calibrated.pt", args.target, card)  # half precision changes the scores
    command = [args.target, args.data, "--captions", files["val"], "--cache-dir", args.cache_dir]
    command += ["--beam-size", BEAM_SIZE]
    metrics = evaluate.run(evaluate.parse_args([*map(str, command)]))
    export(args.out / "calibrated.pt", args.target, card | {"validation": metrics})
    history = history_of(args.out, captions.captions)
    write_text(args.target.with_suffix(".history.json"), json.dumps(history))
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
