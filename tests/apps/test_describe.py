"""Captions of a photo with confidence and attention, and their HTML."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from apps.web.describe import MAX_PHOTOS, card, cards, describe, escape
from captioning.base.tokens import SPECIAL_TOKENS
from captioning.decoding.captioner import Captioned

WORDS = [*SPECIAL_TOKENS, "a", "cat", "dog", "on", "{{x}}", "<b>"]


def random_model(inject="attend"):
    model = tiny_model(WORDS, inject=inject).eval()
    torch.manual_seed(11)
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def photo(shared_dataset):
    return shared_dataset / "images" / "01.jpg"


def test_the_first_caption_is_that_of_the_model(model, photo):
    """The page shows the caption that `CaptionModel.caption` returns."""
    assert describe(model, photo, beam_size=4).captions[0] == model.caption(photo, beam_size=4)[0]


@pytest.mark.parametrize("method", ["beam search", "sampling"])
def test_maps(model, photo, method):
    """There is one square map per word of the first caption, and its weights sum to 1."""
    torch.manual_seed(0)
    found = describe(model, photo, method)
    assert found.attention.shape == (len(found.captions[0].split()), 2, 2)
    np.testing.assert_allclose(found.attention.sum((1, 2)), 1, atol=1e-5)


def test_a_model_without_attention_has_no_maps(photo):
    """Without attention, the card has no maps."""
    found = describe(random_model("pre"), photo)
    assert found.attention is None and "maps" not in card(Image.open(photo), found)


def test_sampled_captions_are_different_and_sorted(model, photo):
    """Samples are listed once each, the most probable one first."""
    torch.manual_seed(0)
    found = describe(model, photo, "sampling", temperature=2.0)
    torch.manual_seed(0)
    samples = [*model.describe([photo] * 5, temperature=2.0)]
    best = sorted(samples, key=lambda sample: sample.scores, reverse=True)
    assert found.captions == [*dict.fromkeys(sample.captions[0] for sample in best)]
    assert len(found.captions) > 1


def test_the_badge():
    """The confidence is shown, with a word if it is low; without calibration, nothing is."""
    found = Captioned(None, ["cat"], [-1.0], None, 0.314)
    image = Image.new("RGB", (9, 9))
    assert "unsure, expected CIDEr-D 0.31<" in card(image, found)
    assert ">expected CIDEr-D 0.95<" in card(image, found._replace(confidence=0.95))
    assert "CIDEr" not in card(image, found._replace(confidence=None))


def test_maps_are_darkest_where_the_attention_is_smallest():
    """A white photo is white at the largest weight of a word, and dark at a weight of 0."""
    maps = np.array([[[1.0, 0.0], [0.0, 0.0]]], dtype="float32")
    shown = card(
        Image.new("RGB", (160, 160), "white"), Captioned(None, ["cat"], [-1.0], maps, None)
    )
    content = re.findall(r"base64,([^\"]*)", shown)[1]
    shaded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"))
    assert shaded[:20, :20].min() > 240 and 40 < shaded[-20:, -20:].max() < 90


# ---------------------------------------------------------------------------- HTML


def test_nothing_is_interpreted():
    """Words and names that look like HTML, or like Gradio's templates, are shown as they are."""
    assert escape("<b>{{x}}${y}") == "&lt;b&gt;&#123;&#123;x}}&#36;&#123;y}"
    shown = card(
        Image.new("RGB", (9, 9)), Captioned(None, ["<b> {{x}}"], [-1.0], np.ones((2, 2, 2)), None)
    )
    assert "<b>" not in shown and "{{" not in shown


def test_images_are_in_the_page(model, photo):
    """The HTML contains its images: it names no address and no file."""
    sources = re.findall(r'src="([^"]*)"|url\(([^)]*)\)', cards(model, [photo]))
    assert len(sources) > 2 and all("".join(pair).startswith("data:image/") for pair in sources)


def test_a_bad_file_is_a_sentence(model, photo, tmp_path, monkeypatch):
    """A file that is no image, has too many pixels, or has been deleted, is named without its
    folder, with what to do; the other photos are captioned.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    monkeypatch.setattr("apps.web.describe.MAX_PIXELS", 2000 * 1500 - 1)
    bad = [tmp_path / name for name in ("notes.jpg", "bomb.png", "old.jpg", "large.jpg")]
    bad[0].write_text("no photo")
    Image.new("1", (100, 100)).save(bad[1])
    Image.new("L", (2000, 1500)).save(bad[3])
    shown = cards(model, [*bad, photo])
    errors = re.findall(r'<p class="error">(\S+): (.*?)</p>', shown)
    assert [name for name, _ in errors] == [path.name for path in bad]
    assert "bomb" in errors[1][1] and "add the photo again" in errors[2][1]
    assert "2000 x 1500 pixels are too many" in errors[3][1]
    assert shown.count("<article") == 1 and str(tmp_path) not in shown


def test_number_of_photos(model, photo):
    """At most MAX_PHOTOS are captioned, and the page says so."""
    shown = cards(model, [photo] * (MAX_PHOTOS + 1), "beam search", 1)
    assert shown.count("<article") == MAX_PHOTOS and f"first {MAX_PHOTOS} photos" in shown
