"""The options of a training run, for the notebooks and the command line.

config_for("synthetic", prepare_splits("synthetic", "data/synthetic"), out="runs/x", epochs=3)
parse_args(["--train-images", "train2017", ...])
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from captioning.base.checkpoints import load_checkpoint
from captioning.base.options import add_arguments, names_with, option
from captioning.data.coco import read_captions, write_captions
from captioning.networks.model_config import ModelConfig


@dataclass(kw_only=True)
class TrainConfig(ModelConfig):
    """Everything that a run depends on; the command line's flags are these fields.

    `may_change`: options that may differ when a run is resumed; another value of any other option
    would make it another run. `required`: by the command line and `build_run`, not by a `Run` with
    your own loaders.
    """

    train_images: str | None = option(
        None, "folder of the training images", required=True, may_change=True
    )
    train_captions: str | None = option(
        None, "their captions, a JSON file in COCO's format", required=True, may_change=True
    )
    val_images: str | None = option(
        None, "folder of the validation images", required=True, may_change=True
    )
    val_captions: str | None = option(
        None, "their captions, a JSON file in COCO's format", required=True, may_change=True
    )
    out: str = option(help="folder for checkpoints, history and metrics", may_change=True)
    weights: str | None = option(
        "DEFAULT", "weights of the CNN: torchvision's name, a state dict's path, or none"
    )
    min_word_freq: int = option(5, "rarer words of the training captions become <unk>", at_least=1)
    # training
    epochs: int = option(10, "passes over all training captions", at_least=1, may_change=True)
    crops: int = option(0, "random crops in addition to each training image", at_least=0)
    batch_size: int = option(64, "captions per batch", at_least=1)
    grad_accum_steps: int = option(2, "batches per optimizer step, to mix lengths", at_least=1)
    learning_rate: float = option(2e-3, "highest learning rate (of AdamW)", above=0)
    backbone_learning_rate: float = option(3e-5, "that of the CNN, if it is trained", above=0)
    schedule: str = option("one-cycle", "learning-rate schedule", choices=("one-cycle", "constant"))
    weight_decay: float = option(0.01, "weight decay of matrices, not of embeddings", at_least=0)
    grad_clip: float = option(5.0, "maximum norm of the gradient", above=0)
    patience: int = option(
        4, "stop after this number of epochs without improvement", at_least=0, may_change=True
    )
    best_by: str = option("loss", "criterion of the best epoch", choices=("loss", "cider"))
    init_from: str | None = option(
        None,
        "checkpoint to start from, with its architecture and what its CNN sees",
        may_change=True,
    )
    loss: str = option("cross-entropy", "loss function", choices=("cross-entropy", "self-critical"))
    label_smoothing: float = option(
        0.0, "label smoothing of the cross-entropy", at_least=0, below=1
    )
    samples: int = option(5, "captions per image in self-critical training", at_least=2)
    xe_weight: float = option(
        0.0, "weight of the cross-entropy in self-critical training", at_least=0
    )
    seed: int = option(
        0, "random seed of initialization, data order and dropout", at_least=0, below=2**32
    )
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", may_change=True)
    num_workers: int = option(0, "processes that load images", at_least=0, may_change=True)
    cache_dir: str = option("runs/cache", "folder for features of the CNN", may_change=True)
    skip_bad_images: bool = option(False, "exclude unreadable images and list them")
    overwrite: bool = option(False, "start again in a folder with an earlier run", may_change=True)
    resume: bool = option(False, "continue from last.pt in --out, if it exists", may_change=True)
    save_every: int = option(
        0, "also save every N batches; 0: only after epochs", at_least=0, may_change=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.crops and self.fine_tune != "none":
            raise ValueError(
                "crops are for cached features: with fine_tune, every epoch has new random crops, "
                "so leave crops at 0"
            )
        if self.loss == "self-critical" and self.init_from is None:
            raise ValueError("self-critical training starts from a trained model: give --init-from")
        dropout = self.dropout or self.feature_dropout
        if self.loss == "self-critical" and (dropout or self.best_by != "cider"):
            raise ValueError(
                "self-critical training requires --dropout 0, --feature-dropout 0 and --best-by "
                "cider, which are its defaults"
            )

    @property
    def group_images(self) -> bool:
        """Whether a training batch contains images with all their captions, each image once."""
        return self.inject == "attend" or self.fine_tune != "none" or self.loss == "self-critical"

    @property
    def captions_per_batch(self) -> int:
        """`batch_size`; grouped by image, a batch has all captions of an optimizer step."""
        return self.batch_size * (self.grad_accum_steps if self.group_images else 1)

    @property
    def batches_per_update(self) -> int:
        """Batches per optimizer step, see `captions_per_batch`."""
        return 1 if self.group_images else self.grad_accum_steps

    def model_config(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


# Synthetic scenes are small and simple.
SCENES = {
    "backbone": "mobilenet_v3_small",
    "weights": "captioning/scenes/encoder.pt",
    "image_size": 96,
    "embed_size": 128,
    "hidden_size": 256,
    "dropout": 0.0,
    "epochs": 10,
    "batch_size": 64,
    "grad_accum_steps": 1,
    "learning_rate": 4e-3,
}

# A trained model continues on other images, of which there may be few.
CONTINUE = {
    "learning_rate": 5e-5,
    "dropout": 0.5,
    "feature_dropout": 0.5,
    "label_smoothing": 0.1,
    "batch_size": 16,
    "grad_accum_steps": 1,
    "min_word_freq": 2,
    "best_by": "cider",
}

# Self-critical training improves a trained model in small steps.
SELF_CRITICAL = {
    "learning_rate": 5e-5,
    "schedule": "constant",
    "weight_decay": 0.0,
    "dropout": 0.0,
    "feature_dropout": 0.0,
    "best_by": "cider",
}


def config_for(dataset, splits, out, **changes) -> TrainConfig:
    """The config for a dataset by its name and the splits that `prepare_splits` returns.

    `changes` override the preset of the dataset and what `defaults_of` returns.
    """
    names = ("train_images", "train_captions", "val_images", "val_captions")
    files = [str(path) for split in ("train", "val") for path in splits[split]]
    options = {**dict(zip(names, files, strict=True)), "out": str(out)}
    presets = SCENES if dataset == "synthetic" else {}
    chosen = (changes.get(name) for name in ("loss", "init_from", "inject"))
    return TrainConfig(**options | presets | defaults_of(*chosen) | changes)


def first_images(config, count):
    """The config with at most `count` training and `count` validation images, in their order.

    Datasets that have no more remain as they are; of others, captions files are written to
    `config.out`/first.
    """
    changes = {}
    for name in ("train_captions", "val_captions"):
        content = read_captions(getattr(config, name)).dataset
        images = content["images"][:count]
        if len(images) < len(content["images"]):
            ids = {image["id"] for image in images}
            kept = [x for x in content["annotations"] if x["image_id"] in ids]
            file = Path(config.out, "first", f"{name}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_captions(file, images, kept, f"the first {count} images")
            changes[name] = str(file)
    return replace(config, **changes)


def defaults_of(loss, init_from=None, inject=None) -> dict:
    """The options whose defaults depend on the loss, the checkpoint to start from, or inject."""
    own = SELF_CRITICAL if loss == "self-critical" else {}
    if str(init_from).lower() != "none":
        config = load_checkpoint(init_from)["config"]
        marked = names_with(ModelConfig, "fits") + names_with(ModelConfig, "sees")
        return (own or CONTINUE) | {name: config[name] for name in marked}
    if inject in ("init", "pre"):  # they read the image once, and its scale matters
        return own | {"image_norm": True}
    return own


def parse_args(arguments=None) -> TrainConfig:
    """The config that command-line arguments describe: a flag for every field."""
    parser = argparse.ArgumentParser(
        description="Train an image captioning model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, TrainConfig)
    first = parser.parse_args(arguments)
    parser.set_defaults(**defaults_of(first.loss, first.init_from, first.inject))
    return TrainConfig(**vars(parser.parse_args(arguments)))
