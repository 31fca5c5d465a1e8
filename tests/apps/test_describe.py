"""Captions of a photo with probabilities and attention, and their HTML."""

import re

import numpy as np
import pytest
import torch
from conftest import calibrated_weights
from PIL import Image

from apps.web import describe as module
from apps.web.describe import ALTERNATIVES, MAX_PHOTOS, card, cards, describe, escape, number
from captioning.learning.options import ModelConfig
from model import CaptionModel
from vocabulary import SPECIAL_TOKENS

WORDS = [*SPECIAL_TOKENS, "a", "cat", "dog", "on", "{{x}}", "<b>"]


def random_model(inject="attend", seed=11):
    weights = calibrated_weights()
    torch.manual_seed(seed)  # not earlier: the weights are only drawn if they are not cached
    settings = {
        "backbone": "mobilenet_v3_small",
        "image_size": 64,
        "embed_size": 16,
        "hidden_size": 16,
        "precision": "float32",
    }
    config = ModelConfig(**settings, inject=inject)
    model = CaptionModel(WORDS, config, weights).eval()
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


def test_maps(model, photo):
    """There is one square map per word of the first caption, and its weights sum to 1."""
    found = describe(model, photo)
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
    assert 1 < len(set(found.captions)) == len(found.captions) <= ALTERNATIVES
    assert found.probabilities == sorted(found.probabilities, reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "guessing"},
        {"beam_size": 0},
        {"beam_size": 11},
        {"beam_size": float("nan")},
        {"method": "sampling", "temperature": 0.0},
        {"method": "sampling", "temperature": 1e9},
    ],
    ids=str,
)
def test_options_out_of_range(model, photo, options):
    """An option that is out of range is an error, before anything is computed."""
    with pytest.raises(ValueError, match="choose"):
        describe(model, photo, **options)


def test_numbers():
    """Probabilities are percentages, small ones powers of ten."""
    assert [number(p) for p in (1.0, 0.127, 0.0127, 1.4e-6)] == [
        "100 %",
        "13 %",
        "1.3 %",
        "1.4 × 10<sup>-6</sup>",
    ]


def test_nothing_is_interpreted(model, photo):
    """Words and names that look like HTML, or like Gradio's templates, are shown as they are."""
    assert escape("<b>{{x}}${y}") == "&lt;b&gt;&#123;&#123;x}}&#36;&#123;y}"
    shown = card(Image.open(photo), module.Description(["<b> {{x}}"], [0.5], None))
    assert "<b>" not in shown and "{{" not in shown


def test_images_are_in_the_page(model, photo):
    """The HTML contains its images: it names no address and no file."""
    sources = re.findall(r'src="([^"]*)"|url\(([^)]*)\)', cards(model, [photo]))
    assert len(sources) > 2 and all("".join(pair).startswith("data:image/") for pair in sources)


def test_a_bad_file_is_a_sentence(model, photo, tmp_path):
    """A file that is no image is named without its folder; the other photos are captioned."""
    bad = tmp_path / "notes.jpg"
    bad.write_text("no photo")
    shown = cards(model, [bad, photo])
    assert re.search(r'class="error">notes.jpg: ', shown) and str(tmp_path) not in shown
    assert shown.count("<article") == 1


def test_decompression_bomb(model, tmp_path):
    """An image of more pixels than Pillow's limit is refused without decoding it."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert re.fullmatch(
        r'<p class="error">bomb.png: .*decompression bomb.*</p>',
        cards(model, [tmp_path / "bomb.png"]),
    )


def test_deleted_upload(model, tmp_path):
    """An upload that has been deleted meanwhile is a sentence that says what to do."""
    assert "add the photo again" in cards(model, [tmp_path / "old.jpg"])


def test_number_of_photos(model, photo):
    """At most MAX_PHOTOS are captioned, and the page says so."""
    shown = cards(model, [photo] * (MAX_PHOTOS + 1), beam_size=1)
    assert shown.count("<article") == MAX_PHOTOS and f"first {MAX_PHOTOS} photos" in shown
