"""The options of a run, on the command line and for the datasets."""

import json
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import pytest
from conftest import command_line, flag, tiny_config

from captioning.base.options import names_with
from captioning.data.coco import CocoCaptions
from captioning.data.splits import DATASETS
from captioning.learning.train_config import (
    SCENES,
    SELF_CRITICAL,
    TrainConfig,
    config_for,
    first_images,
    parse_args,
)
from model import ModelConfig
from train import build_run

PATHS = names_with(TrainConfig, "required")
REQUIRED = {name: f"{name}.x" for name in [*PATHS, "out"]}
FLAGS = [word for name, text in REQUIRED.items() for word in flag(name, text)]
SPLITS = {"train": ("a", "b"), "val": ("c", "d"), "test": ("e", "f")}


def test_required_options(capsys):
    """The required flags alone give the config with its defaults; each of them is required, while
    in Python a config needs only `out`, and build_run names what is missing."""
    assert parse_args(FLAGS) == TrainConfig(**REQUIRED)
    for start in range(0, len(FLAGS), 2):
        with pytest.raises(SystemExit):
            parse_args(FLAGS[:start] + FLAGS[start + 2 :])
        assert FLAGS[start] in capsys.readouterr().err.splitlines()[-1]
    assert [f.name for f in fields(TrainConfig) if f.default is MISSING] == ["out"]
    with pytest.raises(ValueError, match="no train_images, val_captions; give"):
        build_run(TrainConfig(out="out", train_captions="x", val_images="x"))


@pytest.fixture
def checkpoint(monkeypatch):
    """What is loaded in place of a checkpoint: the default options, but another hidden_size."""
    content = {"config": asdict(ModelConfig(hidden_size=7))}
    monkeypatch.setattr("captioning.learning.train_config.load_checkpoint", lambda path: content)


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda field: field.name)
def test_every_option_has_a_flag(checkpoint, field):
    """Every option can be set by its flag, and has a help text."""
    config = TrainConfig(**REQUIRED)
    value, choices = getattr(config, field.name), field.metadata.get("choices")
    if choices:
        other = choices[-1]
    elif field.name == "image_size":
        other = 96
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, float):
        other = value + 0.5
    else:
        other = value + 1 if isinstance(value, int) else f"{value}.x"
    required = {"init_from": "best.pt", **SELF_CRITICAL} if field.name == "loss" else {}
    changed = replace(config, **required, **{field.name: other})
    assert parse_args(command_line(changed)) == changed != config
    assert field.metadata["help"]


@pytest.mark.parametrize("name", ["weights", "init_from", "image_size"])
def test_none_on_the_command_line(name):
    """`none` on the command line is None."""
    assert getattr(parse_args(command_line(TrainConfig(**REQUIRED | {name: None}))), name) is None


@pytest.mark.parametrize("dataset", DATASETS)
def test_config_for(dataset):
    """A dataset's config has the paths of its splits and its preset; changes override both."""
    config = config_for(dataset, SPLITS, "out", val_images="x", epochs=77)
    paths = dict(zip(PATHS, ["a", "b", "x", "d"], strict=True))
    preset = SCENES if dataset == "synthetic" else {}
    assert {**preset, **paths, "out": "out", "epochs": 77}.items() <= asdict(config).items()


@pytest.mark.parametrize("inject, expected", [("init", True), ("pre", True), ("par", False)])
def test_image_norm_of_the_injections(inject, expected):
    """The image embedding is normalized by default where the decoder reads it once."""
    assert parse_args([*FLAGS, "--inject", inject]).image_norm is expected
    assert config_for("folder", SPLITS, "out", inject=inject).image_norm is expected


def test_first_images(dataset):
    """The config reads the first images of each split, with all their captions."""
    config = tiny_config(dataset)
    small = first_images(config, 2)
    for name in ("train", "val"):
        images = getattr(config, f"{name}_images")
        files = [(images, getattr(c, f"{name}_captions")) for c in (config, small)]
        whole, part = (CocoCaptions(*pair) for pair in files)
        listed = json.loads(Path(files[0][1]).read_text())["images"]
        assert part.image_ids == sorted(image["id"] for image in listed[:2])
        captions = dict(zip(whole.image_ids, whole.captions, strict=True))
        assert part.captions == [captions[number] for number in part.image_ids]
    assert first_images(config, 1000) == config
