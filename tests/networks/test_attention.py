"""The attention decoder."""

import numpy as np
import pytest
import torch
from naive import NaiveAttentionDecoder

from captioning.base.tokens import END, START
from captioning.decoding.generate import generate
from captioning.networks.attention import AttentionDecoder

M, P, C, E, V = 3, 6, 7, 8, 11  # images, positions, feature_size, embed_size, words
CAPTIONS = torch.tensor([[1, 4, 5, 8, 7, 2], [1, 6, 2, 0, 0, 0], [1, 4, 6, 3, 2, 0]])
INDEX = torch.tensor([2, 0, 2])  # the image of each caption


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = AttentionDecoder(E, 12, V, C, dropout=0.5, num_heads=2).eval()
    for weight in decoder.parameters():  # large weights, so that the attention is not uniform
        weight.data.mul_(3)
    return decoder


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(1)
    return torch.randn(M, P, C) / 3


def test_teacher_forcing(decoder, features):
    """Whole captions at once give the logits of a decoder that reads word by word, in numpy."""
    logits = decoder(features, CAPTIONS).detach().numpy()
    naive = NaiveAttentionDecoder(decoder)
    for image, caption, found in zip(features.numpy(), CAPTIONS.tolist(), logits, strict=True):
        np.testing.assert_allclose(found, naive.teacher_forcing(image, caption), atol=1e-4)


def test_step(decoder, features):
    """Decoding step by step gives the logits of teacher forcing, and numpy's attention."""
    logits, naive = decoder(features, CAPTIONS), NaiveAttentionDecoder(decoder)
    memory = decoder.memory(features)
    state = decoder.init_state(memory)
    naive_state = [naive.init_state(image) for image in features.numpy()]
    for t in range(CAPTIONS.size(1) - 1):
        found, state, attention = decoder.step(CAPTIONS[:, t], state, memory)
        torch.testing.assert_close(found, logits[:, t])
        for b in range(M):
            _, naive_state[b], expected = naive.step(
                int(CAPTIONS[b, t]), naive_state[b], features[b].numpy()
            )
            np.testing.assert_allclose(attention[b].detach().numpy(), expected, atol=1e-5)


def test_kept_predictions_and_shared_images(decoder, features):
    """`kept` selects rows of all logits, in that order; `image_index` repeats images."""
    kept = torch.tensor([9, 0, 3])
    found = decoder.predict(decoder.memory(features), CAPTIONS, INDEX, kept)
    expected = decoder(features[INDEX], CAPTIONS).flatten(0, 1)[kept]
    torch.testing.assert_close(found, expected)


def test_trained_attention_finds_the_object():
    """Trained to name two objects, the attention is on the position of the one that is named.

    Each image has two of six objects, at random positions of nine; a caption names the one of the
    first kind, and then the one of the second. Chance is 1/9 of the attention; with seeds 0 to 5,
    86 % to 99 % were on the object.
    """
    torch.manual_seed(0)
    decoder = AttentionDecoder(16, 32, 10, feature_size=6)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)

    def scenes(count):
        objects = torch.stack([torch.randint(3, (count,)), 3 + torch.randint(3, (count,))], 1)
        positions = torch.rand(count, 9).argsort(1)[:, :2]
        images = torch.zeros(count, 9, 6)
        images[torch.arange(count).unsqueeze(1), positions, objects] = 1.0
        start, end = torch.full((count, 1), START), torch.full((count, 1), END)
        return images, torch.cat([start, 4 + objects, end], 1), positions

    for _ in range(300):
        images, captions, _ = scenes(64)
        logits = decoder(images, captions).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, captions[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, captions, positions = scenes(100)
    decoded = generate(decoder.eval(), images)
    assert (decoded.tokens[:, 0] == captions[:, 1:]).float().mean() > 0.95
    on_object = decoded.attention[:, 0, :2].gather(2, positions.unsqueeze(2))
    assert on_object.mean((0, 2)).min() > 0.5


def test_heads_must_divide():
    """An embedding that cannot be divided among the heads is refused."""
    with pytest.raises(ValueError, match="not divisible"):
        AttentionDecoder(10, 12, V, C, num_heads=4)
