"""The model card: what a checkpoint says about its training."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, calibrated_weights, tiny_config

import model as model_module
from captioning.base.checkpoints import export, load_safely, save
from captioning.data.coco import CocoCaptions
from captioning.learning.card import training_card
from captioning.learning.loop import fit
from model import CaptionModel
from train import build_run

NAME = "Twelve coloured squares"


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """The folder of a run on captions with a description."""
    content = json.loads((shared_dataset / "captions.json").read_text())
    content["info"] = {"description": "Twelve\n coloured squares"}
    (shared_dataset / "captions.json").write_text(json.dumps(content))
    fit(build_run(tiny_config(shared_dataset, epochs=1, best_by="cider")))
    return shared_dataset / "out"


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_card_of_a_run(trained, name):
    """A checkpoint's card has the data, the date, the CNN, and the scores of the last epoch."""
    card = CaptionModel.from_checkpoint(trained / name).card
    size = {"images": len(CAPTIONS), "captions": sum(map(len, CAPTIONS))}
    assert card["summary"] == f"trained on 12 images with {size['captions']} captions: {NAME}"
    assert card["data"] == {"name": NAME} | size
    assert 0 <= (date.today() - date.fromisoformat(card["date"])).days <= 1
    weights = {"weights": Path(calibrated_weights()).name, "licence": "not recorded"}
    assert card["encoder"] == {"network": "mobilenet_v3_small"} | weights
    line = json.loads((trained / "history.jsonl").read_text())
    scores = {"perplexity": line["val_perplexity"], "CIDEr-D": line["val_cider"]}
    assert card["validation"] == size | {"epoch": 1} | scores
    assert json.loads(json.dumps(card)) == card and "limitations" in card


@pytest.mark.parametrize(
    "backbone, weights, licence",
    [
        ("resnet50", "DEFAULT", "torchvision"),
        ("timm/convnext_atto", "DEFAULT", "timm"),
        ("timm/tf_efficientnet_lite2", "efficientnet_lite2.pth", "Apache"),
        ("resnet50", None, "random"),
    ],
)
def test_licence_of_the_cnn(trained, shared_dataset, backbone, weights, licence):
    """The card has a note on the licence of pre-trained weights whose origin is known."""
    data = CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")
    config = tiny_config(shared_dataset, backbone=backbone, weights=weights)
    assert licence in training_card(config, data, data)["encoder"]["licence"]


@pytest.mark.parametrize("info", [None, [], {}, {"description": 7}, {"description": " "}], ids=str)
def test_data_without_a_description(dataset, info):
    """Without a description, the data set is called as its captions file."""
    content = json.loads((dataset / "captions.json").read_text())
    (dataset / "captions.json").write_text(json.dumps(content | {"info": info}))
    data = CocoCaptions(dataset / "images", dataset / "captions.json")
    assert training_card(tiny_config(dataset), data, data)["data"]["name"] == "captions.json"


def test_card_of_a_run_that_continues_another(trained, shared_dataset, tmp_path):
    """With --init-from, the card has the first model's training data, encoder and licence."""
    source = tmp_path / "source.pt"
    entries = {"summary": "A.", "encoder": {"network": "x"}, "licence": "research"}
    export(trained / "best.pt", source, card=entries)
    config = tiny_config(shared_dataset, init_from=str(source), out=str(tmp_path))
    card = build_run(config).model.card
    assert card["initialized from"] == "A." and card["encoder"] == {"network": "x"}
    assert card["licence"] == "research"
    assert card["data"]["name"] == NAME


@pytest.mark.parametrize("card", [None, "text", [], {}, {"summary": None}, torch.ones(2)], ids=str)
def test_damaged_card(trained, tmp_path, card):
    """A card that is not a dict with a summary is an error that names the file."""
    torch.save(load_safely(trained / "best.pt") | {"card": card}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is damaged: its card"):
        CaptionModel.from_checkpoint(tmp_path / "bad.pt")


def test_export_keeps_the_card(trained, tmp_path):
    """The card survives loading, saving and exporting, which adds the entries that are given."""
    card = load_safely(trained / "best.pt")["card"]
    save(CaptionModel.from_checkpoint(trained / "best.pt").checkpoint(), tmp_path / "again.pt")
    export(tmp_path / "again.pt", tmp_path / "same.pt")
    assert CaptionModel.from_checkpoint(tmp_path / "same.pt").card == card
    changes = {"summary": "Mine.", "notes": "two"}
    export(trained / "best.pt", tmp_path / "more.pt", card=changes)
    assert CaptionModel.from_checkpoint(tmp_path / "more.pt").card == card | changes


def test_pretrained(trained, tmp_path, monkeypatch):
    """`pretrained` loads photo_captioner.pt; without it, one sentence says so."""
    monkeypatch.setattr(model_module, "PRETRAINED", tmp_path / "photo_captioner.pt")
    with pytest.raises(FileNotFoundError, match="no file .*photo_captioner.pt"):
        CaptionModel.pretrained()
    shutil.copy(trained / "best.pt", tmp_path / "photo_captioner.pt")
    expected = CaptionModel.from_checkpoint(trained / "best.pt")
    model = CaptionModel.pretrained()
    assert model.card == expected.card and model.vocab.words == expected.vocab.words


def test_included_model():
    """photo_captioner.pt is small, has a complete card, and its attention differs between words."""
    assert model_module.PRETRAINED.stat().st_size <= 25e6
    model, photos = CaptionModel.pretrained(), Path(model_module.__file__).parent / "photos"
    assert model.card.keys() >= {"summary", "licence", "limitations", "validation", "command"}
    (caption,), (maps,) = model.caption(photos / "camera.jpg", return_attention=True)
    assert "man" in caption.split()
    weights = torch.as_tensor(maps).float().flatten(1)  # (words, positions)
    assert (weights[:, None] - weights).abs().sum(2).max() > 0.5  # 2: nothing in common
