"""The options of a model and of a training run, for the notebooks and the command line.

config_for("synthetic", find_splits("synthetic", "data/synthetic"), out="runs/x", epochs=3)
parse_args(["--train-images", "train2017", ...])
"""

import argparse
import ast
import inspect
import re
from dataclasses import MISSING, dataclass, fields

from captioning.base.distributed import PRECISIONS
from captioning.learning.checkpoint import config_and_words, load_safely

CHOICES = {
    "precision": PRECISIONS,
    "inject": ("pre", "par", "init", "attend"),
    "best_by": ("loss", "cider"),
    "loss": ("cross-entropy", "self-critical"),
    "fine_tune": ("none", "last", "all"),
    "schedule": ("one-cycle", "constant"),
}
AT_LEAST_1 = (
    "image_size",
    "embed_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "epochs",
    "batch_size",
    "grad_accum_steps",
    "min_word_freq",
)
AT_LEAST_0 = ("patience", "save_every", "num_workers", "crops", "weight_decay", "xe_weight", "seed")
FRACTIONS = ("dropout", "feature_dropout", "label_smoothing")
ABOVE_0 = ("learning_rate", "backbone_learning_rate", "grad_clip")


# The options of a model that its weights fit, and those that say what it is shown.
ARCHITECTURE = (
    "backbone",
    "embed_size",
    "image_norm",
    "hidden_size",
    "num_layers",
    "inject",
    "num_heads",
)
INPUT = ("image_size", "flip", "no_image")


@dataclass(kw_only=True)
class ModelConfig:
    """The architecture: everything but the words and the weights."""

    backbone: str = "resnet50"  # a network of torchvision ("quantized_*" use int8), or timm/NAME
    image_size: int | None = None  # side of the square input in pixels; none: the network's own
    flip: bool = False  # use the features of each image and of its horizontal flip too
    no_image: bool = False  # replace the features by zeros: the no-image baseline
    fine_tune: str = "none"  # what to train of the CNN: none, its last stage, or all (slow)
    embed_size: int = 256  # size of the word and image embeddings
    image_norm: bool = False  # batch normalization of the image embedding (with init, pre: True)
    hidden_size: int = 512  # size of the LSTM state
    num_layers: int = 1  # LSTM layers
    dropout: float = 0.2  # on the word embeddings and the LSTM outputs
    feature_dropout: float = 0.0  # on the features of the CNN
    inject: str = "par"  # how the image enters the LSTM: par, pre, init or attend
    num_heads: int = 1  # attention heads (of inject attend)
    precision: str = "auto"  # auto (bfloat16 where the hardware accelerates it), float32, bfloat16


@dataclass(kw_only=True)
class TrainConfig(ModelConfig):
    """Everything a run depends on; the command line's flags are these fields."""

    train_images: str  # folder of the training images
    train_captions: str  # their captions, a JSON file in COCO's format
    val_images: str  # folder of the validation images
    val_captions: str  # their captions
    out: str  # folder for checkpoints, history and metrics
    weights: str | None = "DEFAULT"  # of the CNN: torchvision's name, a state dict's path, or none
    min_word_freq: int = 5  # words that occur less often in the training captions become <unk>
    # training
    epochs: int = 10  # passes over all training captions
    crops: int = 0  # random crops of each training image whose features are used too
    batch_size: int = 64  # captions per batch, all of similar length
    grad_accum_steps: int = 2  # batches per optimizer step, which mixes lengths
    learning_rate: float = 2e-3  # maximum of the schedule (AdamW)
    backbone_learning_rate: float = 3e-5  # the same for the part of the CNN that is trained
    schedule: str = "one-cycle"  # of the learning rate: one-cycle or constant
    weight_decay: float = 0.01  # of weight matrices; biases and embeddings do not decay
    grad_clip: float = 5.0  # maximum norm of the gradient
    patience: int = 4  # stop after this number of epochs without improvement
    best_by: str = "loss"  # criterion of the best epoch on validation: loss or cider
    init_from: str | None = None  # checkpoint to start from; it has defaults, see FINE_TUNING
    loss: str = "cross-entropy"  # cross-entropy, or self-critical with the defaults SELF_CRITICAL
    label_smoothing: float = 0.0  # of the cross-entropy's targets
    samples: int = 5  # captions sampled per image in self-critical training
    xe_weight: float = 0.0  # of the cross-entropy that is added to the self-critical loss
    seed: int = 0  # of initialization, data order and dropout
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: int = 0  # processes that load images
    cache_dir: str = "runs/cache"  # folder for the features of the frozen CNN
    skip_bad_images: bool = False  # exclude unreadable images and list them
    overwrite: bool = False  # start again in a folder that contains an earlier run
    resume: bool = False  # continue from last.pt in --out, if it exists
    deterministic: bool = False  # bit-identical results on a GPU too, slower there
    save_every: int = 0  # also save every N batches; 0: only after epochs

    def __post_init__(self):
        for name in ("weights", "init_from", "image_size"):
            if str(getattr(self, name)).lower() == "none":
                setattr(self, name, None)
        for names, valid, text in (
            (AT_LEAST_1, lambda x: x >= 1, "at least 1"),
            (AT_LEAST_0, lambda x: x >= 0, "at least 0"),
            (ABOVE_0, lambda x: x > 0, "greater than 0"),
            (FRACTIONS, lambda x: 0 <= x < 1, "at least 0 and less than 1"),
            (("seed",), lambda x: x < 2**32, "less than 2**32"),
            (("samples",), lambda x: x >= 2, "at least 2"),
        ):
            for name in names:
                if getattr(self, name) is not None and not valid(getattr(self, name)):
                    raise ValueError(f"{name} is {getattr(self, name)}, but must be {text}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(choices)}"
                )
        if self.inject == "attend" and self.num_layers > 1:
            raise ValueError("inject attend has two LSTMs of one layer each: num_layers must be 1")
        if self.no_image and self.fine_tune != "none":
            raise ValueError("no_image hides the images from the CNN: it cannot be fine-tuned")
        if self.crops and self.fine_tune == "all":
            raise ValueError(
                "crops are for cached features: with fine_tune all, every epoch has new random "
                "crops, so leave crops at 0"
            )
        if self.loss == "self-critical":
            self.check_self_critical()

    def check_self_critical(self):
        if self.init_from is None:
            raise ValueError("self-critical training starts from a trained model: give --init-from")
        if self.dropout or self.feature_dropout or self.best_by != "cider":
            raise ValueError(
                "self-critical training requires --dropout 0, --feature-dropout 0 and --best-by "
                "cider, which are its defaults"
            )

    @property
    def group_images(self) -> bool:
        """Whether a training batch contains images with all their captions, each image once."""
        return self.inject == "attend" or self.fine_tune != "none" or self.loss == "self-critical"

    @property
    def batches_per_update(self) -> int:
        """Batches per optimizer step; one grouped by image contains all captions of the step."""
        return 1 if self.group_images else self.grad_accum_steps

    def model_config(self) -> ModelConfig:
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


# Synthetic scenes are small and simple; all other datasets use the defaults above.
PRESETS = {
    "synthetic": {
        "backbone": "mobilenet_v3_small",
        "weights": "captioning/scenes/encoder.pt",
        "image_size": 96,
        "embed_size": 128,
        "hidden_size": 256,
        "dropout": 0.0,
        "epochs": 8,
        "batch_size": 32,
        "grad_accum_steps": 1,
        "learning_rate": 3e-3,
    }
}

# A trained model continues on other images, of which there may be few.
FINE_TUNING = {
    "learning_rate": 2e-4,
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
    """The config for one of `splits.DATASETS`, given its `find_splits`; `changes` override it.

    What `defaults_of` returns overrides the preset of the dataset.
    """
    names = ("train_images", "train_captions", "val_images", "val_captions")
    files = [str(path) for split in ("train", "val") for path in splits[split]]
    options = {**dict(zip(names, files, strict=True)), "out": str(out)}
    choices = (changes.get(name) for name in ("loss", "init_from", "inject"))
    presets = PRESETS.get(dataset, {}) | defaults_of(*choices)
    return TrainConfig(**{**options, **presets, **changes})


def defaults_of(loss, init_from=None, inject=None) -> dict:
    """The options whose defaults depend on the loss, the checkpoint to start from, or inject."""
    own = SELF_CRITICAL if loss == "self-critical" else {}
    if str(init_from).lower() != "none":
        return (own or FINE_TUNING) | model_options_of(init_from)
    if inject in ("init", "pre"):  # they read the image once, and its scale matters
        return own | {"image_norm": True}
    return own


def model_options_of(path) -> dict:
    """The options ARCHITECTURE and INPUT of the model in a checkpoint.

    None of them if the file contains no such model: `build_run` raises an error for it.
    """
    try:
        config, _ = config_and_words(load_safely(path))
        return {name: config[name] for name in (*ARCHITECTURE, *INPUT) if name in config}
    except (OSError, LookupError, TypeError, AttributeError, ValueError):
        return {}


def parse_args(arguments=None) -> TrainConfig:
    """The config that command-line arguments describe: a flag for every field."""
    parser = argparse.ArgumentParser(
        description="Train an image captioning model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    texts = field_comments(ModelConfig) | field_comments(TrainConfig)
    for field in fields(TrainConfig):
        options = {"help": texts[field.name], "choices": CHOICES.get(field.name)}
        if field.type in (bool, "bool"):
            options = {"help": texts[field.name], "action": "store_true"}
        elif field.default is MISSING:
            options["required"] = True
        else:
            default = field.default
            options |= {"default": default, "type": str if default is None else type(default)}
            if field.type == int | None:
                options["type"] = integer_or_none
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    first = parser.parse_args(arguments)
    parser.set_defaults(**defaults_of(first.loss, first.init_from, first.inject))
    return TrainConfig(**vars(parser.parse_args(arguments)))


def integer_or_none(text):
    return None if text.lower() == "none" else int(text)


def field_comments(config_class) -> dict[str, str]:
    """The comment behind each field of a dataclass in the source: its help text."""
    lines = inspect.getsource(config_class).split("\n")
    nodes = [
        node for node in ast.parse("\n".join(lines)).body[0].body if isinstance(node, ast.AnnAssign)
    ]
    return {node.target.id: re.search(r"#\s*(.*)", lines[node.lineno - 1])[1] for node in nodes}
