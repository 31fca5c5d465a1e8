"""The figures of result_show: photographs, attention, nouns and test images."""

import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.gallery import (
    GREEN,
    Photograph,
    attention_strip,
    caption_photographs,
    show_photographs,
    show_versions,
)
from captioning.figures.image_text import RED
from captioning.figures.mistakes import load_results, show_results
from captioning.figures.nouns import main_nouns, noun_counts


def photograph(name="pig.jpg", predicted="a pig sleeps", verdict=None):
    maps = np.full((len(predicted.split()), 2, 2), 0.25)
    return Photograph(name, Image.new("RGB", (60, 60)), predicted, "A pig.", 0.5, maps, verdict)


def texts(axes):
    return [text.get_text() for text in axes[0].figure.texts]


def test_photographs_have_their_captions_verdict_and_confidence():
    """Below each photograph are both captions; what was not judged is not called wrong."""
    verdicts = {True: "✓ right", False: "✗ wrong", None: "not judged"}
    axes = show_photographs([photograph(verdict=verdict) for verdict in verdicts])
    assert len(axes) == 3
    for row, text in enumerate(verdicts.values()):
        expected = ["a pig sleeps", f"{text} · confidence 0.50", "actual: A pig."]
        assert texts(axes)[3 * row : 3 * row + 3] == expected


@pytest.mark.parametrize("number", [1, 12])
def test_text_stays_within_the_figure(number):
    """Also captions that need more room than the image beside them."""
    axes = show_versions(photograph(), {f"epoch {n}": "a pig" for n in range(number)})
    places = [text.get_position() for text in axes[0].figure.texts]
    assert all(0 <= x < 1 and 0 <= y < 1 for x, y in places)
    assert texts(axes)[:2] == ["epoch 0", "a pig"]


def test_attention_strip():
    """A word's colour is its attention relative to the mean over the words, if it is above it."""
    maps = np.array([[[0.7, 0.1], [0.1, 0.1]], [[0.1, 0.7], [0.1, 0.1]]])
    axes = attention_strip(photograph(predicted="a pig")._replace(attention=maps))
    assert len(axes) == 3 and len(axes[0].images) == 1
    opacity = axes[1].images[1].get_array()[..., 3]
    assert opacity[0, 0] > 0 and np.count_nonzero(opacity) == 1
    assert texts(axes) == ["the photograph", "a", "up to 1.8 ×", "pig", "up to 1.8 ×"]


def test_photographs_are_sorted_by_confidence(tmp_path):
    """The verdict is that of the very caption which the model predicts."""
    images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)]
    annotations = [{"id": n, "image_id": n, "caption": f"A pig {n}."} for n in (1, 2)]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    judged = {"1.png": {"a cow": True}, "2.png": {"a pig": False, "a cow": True}}
    (tmp_path / "judgements.json").write_text(json.dumps(judged))
    for n in (1, 2):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{n}.png")

    def caption(paths, **options):
        return ["a hen", "a pig"], [None, None], [0.1, 0.9]

    found = caption_photographs(SimpleNamespace(caption=caption), tmp_path)
    assert [x.name for x in found] == ["2.png", "1.png"]
    assert [x.verdict for x in found] == [False, None]
    assert [x.actual for x in found] == ["A pig 2.", "A pig 1."]


def test_nouns():
    """The objects, from frequent to rare; green if the caption has one of the object's words."""
    photographs = [photograph("owl.jpg", "a bird"), photograph(), photograph("rocket.jpg", "a man")]
    nouns = main_nouns({"owl owls": 1, "pig pigs": 2, "rocket rockets": 0}, photographs)
    assert [(x.noun, x.count, x.named) for x in nouns] == [
        ("pig", 2, True),
        ("owl", 1, False),
        ("rocket", 0, False),
    ]
    dots = noun_counts(nouns, total=4).lines
    assert [to_hex(dot.get_markeredgecolor()) for dot in dots] == [GREEN, RED, RED]
    assert [dot.get_ydata().tolist() for dot in dots] == [[2], [1], [1]]


def test_results(tmp_path, capsys):
    """The best come first, and a mistake is sought only in scenes."""
    captions = ["a red cat in the desert", "a blue house by the calm lake"]
    written = [{"image_id": n, "caption": caption} for n, caption in enumerate(captions)]
    (tmp_path / "test_captions.json").write_text(json.dumps(written[::-1]))
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    test = SimpleNamespace(
        paths=[str(tmp_path / "0.png")] * 2,
        image_ids=[1, 0],
        captions=[
            ["a green house by the calm lake", "a lake"],
            ["a red cat in the desert", "there is a red cat in the desert"],
        ],
    )
    best, worst = load_results(tmp_path, test, "synthetic")
    assert best.predicted == captions[0] and best.cider > worst.cider and not best.mistakes
    assert [mistake.kind for mistake in worst.mistakes] == ["colour"]
    assert worst.actual == "a green house by the calm lake" and worst.mistakes[0].words == (1,)
    assert not any(x.mistakes for x in load_results(tmp_path, test, "coco2017"))
    assert len(show_results([best, worst])) == 2
    assert show_results([]) is None and "no such images" in capsys.readouterr().out
