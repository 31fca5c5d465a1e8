"""Captions of a photo with probabilities and attention, and their HTML."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from apps.web.describe import MAX_PHOTOS, Description, card, cards, describe, escape
from captioning.base.tokens import SPECIAL_TOKENS

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


def test_probabilities(model, photo):
    """A probability is the product of those of the words, computed by teacher forcing."""
    found = describe(model, photo, beam_size=5)
    memory = model.encode(model.preprocess([photo]))
    for caption, probability in zip(found.captions, found.probabilities, strict=True):
        tokens = torch.tensor([[1, *(model.vocab(word) for word in caption.split()), 2]])
        logits = model.decoder(memory, tokens)[0].detach()  # (T-1, V)
        logits[:, [0, 1, 3]] = -torch.inf  # <pad>, <start> and <unk> are never generated
        chosen = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])
        assert probability == pytest.approx(chosen.sum().exp().item(), rel=1e-3)


@pytest.mark.parametrize("method", ["beam search", "sampling"])
def test_maps(model, photo, method):
    """There is one square map per word of the first caption, and its weights sum to 1."""
    torch.manual_seed(0)
    found = describe(model, photo, method)
    assert found.maps.shape == (len(found.captions[0].split()), 2, 2)
    np.testing.assert_allclose(found.maps.sum((1, 2)), 1, atol=1e-5)


def test_a_model_without_attention_has_no_maps(photo):
    """Without attention, maps is None and the card has none."""
    found = describe(random_model("pre"), photo)
    assert found.maps is None and "maps" not in card(Image.open(photo), found)


def test_sampled_captions_are_different_and_sorted(model, photo):
    """Samples are listed once each, the most probable one first."""
    torch.manual_seed(0)
    found = describe(model, photo, "sampling", temperature=2.0)
    assert 1 < len(set(found.captions)) == len(found.captions) <= 5
    assert found.probabilities == sorted(found.probabilities, reverse=True)


def test_maps_are_darkest_where_the_attention_is_smallest():
    """A white photo is white at the largest weight of a word, and dark at a weight of 0."""
    maps = np.array([[[1.0, 0.0], [0.0, 0.0]]], dtype="float32")
    shown = card(Image.new("RGB", (160, 160), "white"), Description(["cat"], [0.5], maps))
    content = re.findall(r"base64,([^\"]*)", shown)[1]
    shaded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"))
    assert shaded[:20, :20].min() > 240 and 40 < shaded[-20:, -20:].max() < 90


# ---------------------------------------------------------------------------- HTML


def test_nothing_is_interpreted():
    """Words and names that look like HTML, or like Gradio's templates, are shown as they are."""
    assert escape("<b>{{x}}${y}") == "&lt;b&gt;&#123;&#123;x}}&#36;&#123;y}"
    shown = card(Image.new("RGB", (9, 9)), Description(["<b> {{x}}"], [0.5], np.ones((2, 2, 2))))
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
    bad = [tmp_path / name for name in ("notes.jpg", "bomb.png", "old.jpg")]
    bad[0].write_text("no photo")
    Image.new("1", (100, 100)).save(bad[1])
    shown = cards(model, [*bad, photo])
    errors = re.findall(r'<p class="error">(\S+): (.*?)</p>', shown)
    assert [name for name, _ in errors] == [path.name for path in bad]
    assert "bomb" in errors[1][1] and "add the photo again" in errors[2][1]
    assert shown.count("<article") == 1 and str(tmp_path) not in shown


def test_number_of_photos(model, photo):
    """At most MAX_PHOTOS are captioned, and the page says so."""
    shown = cards(model, [photo] * (MAX_PHOTOS + 1), "beam search", 1)
    assert shown.count("<article") == MAX_PHOTOS and f"first {MAX_PHOTOS} photos" in shown
