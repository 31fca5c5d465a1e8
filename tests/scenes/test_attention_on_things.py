"""The attention on the objects that a caption names."""

import numpy as np
import pytest

from captioning.scenes.attention_on_things import attention_on_things, box_share
from captioning.scenes.scene import Scene, Thing


@pytest.mark.parametrize("shape", [(3, 3), (4, 8)])
def test_attention_on_things(shape):
    """The share of the attention in a box equals that of the map enlarged to the image's pixels;
    uniform attention gives chance, and a noun that names nothing in the scene is left out."""
    thing = Thing("red", "cat", 20, 70, 37, False)
    scene = Scene("beach", 0, (thing,))
    weights = np.random.default_rng(0).dirichlet(np.ones(shape[0] * shape[1]), 6)
    weights = weights.reshape(6, *shape)
    weights[4] = 1 / weights[0].size
    found = attention_on_things("a red cat a red kitten", weights, scene)
    side = 3 * 128  # divisible by 3, 4 and 8
    for (share, chance), t in zip(found, (2, 5), strict=True):
        pixels = np.repeat(np.repeat(weights[t], side // shape[0], 0), side // shape[1], 1)
        pixels = pixels / pixels.sum()
        assert share == pytest.approx(pixels[3 * 70 : 3 * 107, 3 * 20 : 3 * 57].sum())
        assert chance == pytest.approx((37 / 128) ** 2)
    assert box_share(weights[4], thing) == pytest.approx((37 / 128) ** 2)
    assert attention_on_things("a blue cat", weights, scene) == []
