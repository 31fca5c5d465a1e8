"""Models, epochs and captions are compared as the names of the functions say."""

import json
from pathlib import Path

from conftest import tiny_config

from captioning.data.coco import CocoCaptions
from captioning.figures.comparison import (
    FLICKR8K_REWARDED,
    count_right,
    first_images,
    most_improved,
    perplexity_bars,
)
from captioning.scenes.dataset import write_synthetic


def test_rewarded_history():
    """Every line is a row of the table in docs/flickr8k.md."""
    page = Path(__file__).parents[2].joinpath("docs", "flickr8k.md").read_text(encoding="utf-8")
    for line in FLICKR8K_REWARDED:
        reward = f"{line['train_reward']:.2f}" if "train_reward" in line else ""
        start = f"| {line['epoch']} | {reward} | {line['val_cider']:.3f} ".replace("|  |", "| |")
        (row,) = (row for row in page.splitlines() if row.startswith(start))
        assert f"| {line['val_perplexity']:.1f} |" in row


def test_most_improved(tmp_path):
    """The row whose caption was wrong first and is a reference at last."""
    files = write_synthetic(tmp_path / "scenes", {"train": 4, "val": 1, "test": 1})
    data = CocoCaptions(*files["train"])
    last = [texts[0] for texts in data.captions]
    first = [*last[:2], "something else", last[3]]
    assert most_improved(first, last, data) == 2


def test_perplexity_bars():
    ax = perplexity_bars({"uniform": 69, "with image": 1.61})
    assert [bar.get_height() for bar in ax.patches] == [69, 1.61]
    assert [text.get_text() for text in ax.texts] == ["69.00", "1.61"]


def test_count_right(tmp_path):
    """A caption with another colour is wrong; of photographs nothing is known."""
    files = write_synthetic(tmp_path / "scenes", {"train": 3, "val": 1, "test": 1})
    data = CocoCaptions(*files["train"])
    captions = [texts[1] for texts in data.captions]  # another wording of the same scene
    assert count_right(captions, data) == "3 of 3"
    assert count_right(["a red cat in the meadow", *captions[1:]], data) == "2 of 3"
    data.description = "photographs"
    assert count_right(captions, data) == "known for synthetic scenes only"


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
