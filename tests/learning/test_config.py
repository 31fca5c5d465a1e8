"""The options of a run, on the command line and for the datasets."""

from dataclasses import MISSING, asdict, fields, replace

import pytest
from conftest import command_line

from captioning.data.splits import DATASETS
from captioning.learning.options import PRESETS, SELF_CRITICAL, TrainConfig, config_for, parse_args
from model import ModelConfig

REQUIRED = {f.name: f"{f.name}.x" for f in fields(TrainConfig) if f.default is MISSING}
NAMES = ("train_images", "train_captions", "val_images", "val_captions")


def test_defaults_of_the_command_line():
    """The required flags alone give the config with its defaults."""
    words = [word for name, v in REQUIRED.items() for word in ("--" + name.replace("_", "-"), v)]
    assert parse_args(words) == TrainConfig(**REQUIRED)


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda field: field.name)
def test_every_option_has_a_flag(field):
    """Every option can be set by its flag."""
    config = TrainConfig(**REQUIRED)
    value = getattr(config, field.name)
    choices = {
        "precision": "float32",
        "inject": "attend",
        "best_by": "cider",
        "image_size": 96,
        "loss": "self-critical",
        "schedule": "constant",
        "fine_tune": "last",
    }
    if field.name in choices:
        other = choices[field.name]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, float):
        other = value + 0.5
    else:
        other = value + 1 if isinstance(value, int) else f"{value}.x"
    required = {"init_from": "best.pt", **SELF_CRITICAL} if field.name == "loss" else {}
    changed = replace(config, **required, **{field.name: other})
    assert parse_args(command_line(changed)) == changed != config


@pytest.mark.parametrize("name", ["weights", "init_from", "image_size"])
def test_none_on_the_command_line(name):
    """`none` on the command line is None."""
    assert getattr(parse_args(command_line(TrainConfig(**REQUIRED | {name: None}))), name) is None


def test_help_explains_every_option(capsys):
    """`--help` has a text for every option."""
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for config_class in (ModelConfig, TrainConfig):
        for field in fields(config_class):
            flag = "--" + field.name.replace("_", "-")
            assert len(printed.rsplit(flag, 1)[1].split(" --")[0].split()) > 3, flag


@pytest.mark.parametrize("dataset", DATASETS)
def test_config_for(dataset):
    """A dataset's config has the paths of its splits and its preset; changes override both."""
    splits = {"train": ("a", "b"), "val": ("c", "d"), "test": ("e", "f")}
    config = config_for(dataset, splits, "out", val_images="x", epochs=77)
    paths = dict(zip(NAMES, ["a", "b", "x", "d"], strict=True))
    expected = {**PRESETS.get(dataset, {}), **paths, "out": "out", "epochs": 77}
    assert expected.items() <= asdict(config).items()


def test_model_config():
    """The architecture of a run consists of the fields it shares with ModelConfig."""
    config = TrainConfig(**REQUIRED, hidden_size=7, inject="init")
    assert config.model_config() == ModelConfig(hidden_size=7, inject="init")


@pytest.mark.parametrize("inject, expected", [("init", True), ("pre", True), ("par", False)])
def test_image_norm_of_the_injections(inject, expected, tmp_path):
    """The image embedding is normalized by default where the decoder reads it once."""
    arguments = [
        w for name, text in REQUIRED.items() for w in ("--" + name.replace("_", "-"), text)
    ]
    assert parse_args([*arguments, "--inject", inject]).image_norm is expected
    splits = dict.fromkeys(("train", "val"), (tmp_path, tmp_path))
    assert config_for("folder", splits, tmp_path, inject=inject).image_norm is expected
