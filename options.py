"""What a run depends on: one dataclass, for the notebook and for the command line.

options_for("sample", find_splits("sample", "data/sample"), out="runs/sample", epochs=3)
parse(["--train-images", "train2017", ...])
"""

import argparse
from dataclasses import MISSING, dataclass, field, fields


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """Everything a run depends on; the command line's flags are these fields."""

    train_images: str = option(MISSING, "folder of the training images")
    train_captions: str = option(MISSING, "their captions, a JSON in COCO's format")
    val_images: str = option(MISSING, "folder of the validation images")
    val_captions: str = option(MISSING, "their captions")
    out: str = option(MISSING, "folder for checkpoints, history and metrics")
    # the model
    backbone: str = option("resnet50", "any torchvision classifier; the quantized_ ones use int8")
    weights: str | None = option("DEFAULT", "torchvision's name, a state dict's path, or none")
    fine_tune: bool = option(False, "train the CNN too: slow, nothing can be cached")
    image_size: int = option(224, "side of the square the CNN sees, in pixels")
    mirror: bool = option(False, "see each image mirrored too, and take the mean: better, slower")
    embed_size: int = option(256, "size of word and image embeddings")
    hidden_size: int = option(512, "size of the LSTM's state")
    num_layers: int = option(1, "LSTM layers")
    dropout: float = option(0.3, "on the embedded words and on the LSTM's outputs")
    inject: str = option("par", "how the image enters the LSTM: pre, par (measured best) or init")
    blind: bool = option(False, "show zeros instead of images: the no-image baseline")
    threshold: int = option(5, "a word must occur this often in training to be in the vocabulary")
    # the training
    epochs: int = option(10, "passes over all training captions")
    batch_size: int = option(64, "captions per batch; those of a batch are of like length")
    accumulate: int = option(2, "batches per step of the optimizer, to mix lengths")
    learning_rate: float = option(2e-3, "peak of a one-cycle schedule (AdamW)")
    weight_decay: float = option(0.01, "AdamW's decay")
    clip: float = option(5.0, "largest norm of the gradient")
    patience: int = option(4, "stop after so many epochs without a better validation loss")
    seed: int = option(0, "of initialisation, order and dropout")
    # the machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = option(0, "processes that load images")
    cache: str = option("runs/cache", "folder for the frozen CNN's features")
    skip_bad_images: bool = option(False, "leave out images that cannot be read, and name them")
    overwrite: bool = option(False, "start anew in a folder that holds an earlier run")
    resume: bool = option(False, "go on from last.pt in --out, if it is there already")
    deterministic: bool = option(False, "the same bits every time on a GPU too: slower there")
    save_every: int = option(0, "also save after every so many batches; 0: after epochs only")

    def __post_init__(self):
        for name in ("image_size", "embed_size", "hidden_size", "num_layers", "epochs",
                     "batch_size", "accumulate", "threshold"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but has to be 1 or more")
        for name in ("patience", "save_every", "workers", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but has to be 0 or more")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but has to be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but has to be 0 or more, and below 1")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}, but has to be below 2**32")
        if self.blind and self.fine_tune:
            raise ValueError("blind shows the CNN no images: there is nothing to fine_tune")
        if str(self.weights).lower() == "none":
            self.weights = None


# Drawn scenes are small and simple; every other dataset takes the defaults above.
PRESETS = {
    "sample": {
        "backbone": "mobilenet_v3_small", "weights": "sample_encoder.pt", "image_size": 96,
        "embed_size": 128, "hidden_size": 256, "dropout": 0.0, "epochs": 10, "batch_size": 32,
        "learning_rate": 3e-3,
    },
}  # fmt: skip


def options_for(dataset, splits, out, **changes) -> Options:
    """The options for one of `splits.NAMES`, given its `find_splits`; `changes` come last."""
    files = [str(path) for split in ("train", "val") for path in splits[split]]
    return Options(*files, out=str(out), **{**PRESETS.get(dataset, {}), **changes})


def parse(arguments=None) -> Options:
    """The command line's flags are the fields of Options."""
    parser = argparse.ArgumentParser(
        description="Train a captioner.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Options):
        flag, settings = "--" + f.name.replace("_", "-"), {"help": f.metadata["help"]}
        if f.type in (bool, "bool"):
            settings["action"] = "store_true"
        elif f.default is MISSING:
            settings["required"] = True
        else:
            settings |= {"default": f.default, "type": type(f.default)}
        parser.add_argument(flag, **settings)
    return Options(**vars(parser.parse_args(arguments)))
