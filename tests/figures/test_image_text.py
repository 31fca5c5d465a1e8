"""Images with text below or beside them."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.image_text import INK, RED, Paragraph, image_grid, pictures, wrap

LONG = "a red t-shirt and a car on the long photographically-sandy beach " * 3


def words(lines):
    return [word for line in lines for word, _ in line]


def test_wrap():
    """Lines are as long as they may be, and a word that is too long has a line of its own."""
    paragraph = Paragraph("one two three")
    assert len(wrap(paragraph, 100)) == 1
    assert [words([line]) for line in wrap(paragraph, 0.1)] == [["one"], ["two"], ["three"]]
    weights = ("normal", "bold")
    narrow, bold = (len(wrap(Paragraph("word " * 50, weight=w), 3)) for w in weights)
    assert 1 < narrow < bold


def test_red_words():
    """These words alone are red; lines break without a loss."""
    lines = wrap(Paragraph(LONG, red={1, 5}), 1.5)
    assert words(lines) == LONG.split() and len(lines) > 3
    red = [word for line in lines for word, colour in line if colour == RED]
    assert red == ["red", "car"]
    assert {colour for line in lines for _, colour in line} == {RED, INK}


def test_words_of_a_line_do_not_overlap():
    """Where the colour changes, a word begins to the right of the one before it."""
    (ax,) = pictures([Image.new("RGB", (8, 8))], [[Paragraph("a wide dog", red={1})]], 1, 3)
    ax.figure.canvas.draw()
    extents = [text.get_window_extent() for text in ax.figure.texts]
    assert len(extents) == 3
    assert extents[0].x1 < extents[1].x0 and extents[1].x1 < extents[2].x0


@pytest.mark.parametrize("beside", [None, 2.0])
def test_each_image_has_its_text(beside):
    """The images are in order; a text is within the figure, and clear of the image and of the next
    row, whatever the shapes of the images.
    """
    images = [np.full((2, width, 3), 10 * width, np.uint8) for width in (1, 2, 4)]
    blocks = [[Paragraph(f"{n} {LONG}", 14)] for n in range(3)]
    axes = pictures(images, blocks, 1, 2, beside)
    figure = axes[0].figure
    figure.canvas.draw()
    assert [ax.images[0].get_array()[0, 0, 0] for ax in axes] == [10, 20, 40]
    found = [text.get_window_extent() for text in figure.texts]
    starts = [i for i, text in enumerate(figure.texts) if text.get_text()[0].isdigit()]
    height = figure.bbox.height
    for n, ax in enumerate(axes):
        box, mine = ax.get_window_extent(), found[starts[n] : (starts[n + 1 :] or [None])[0]]
        after = axes[n + 1].get_window_extent().y1 if n < 2 else 0
        for text in mine:
            assert text.x0 > box.x1 if beside else text.y1 <= box.y0
            assert after <= text.y0 < text.y1 <= height


def test_image_grid():
    """A text may have several lines; images need none."""
    axes = image_grid([Image.new("RGB", (8, 8))] * 2, ["a\nb", "c"], columns=1, width=2)
    assert [text.get_text() for text in axes[0].figure.texts] == ["a", "b", "c"]
    assert len(image_grid([np.zeros((2, 2))] * 3)) == 3
