"""Retrieval of images and captions."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from captioning.data.coco import CocoCaptions
from captioning.scoring.retrieval import recall, retrieval
from data_loader import ImageDataset


def test_recall():
    """Ranks counted by hand, with and without the probability of a caption over all images."""
    probabilities = np.array([[0.4, 0.6, 0.01], [0.3, 0.2, 0.02], [0.5, 0.5, 0.04]])
    found = recall(torch.tensor(probabilities).log())
    # Column 0: its image is second; column 1: third; column 2: first.
    assert found["text-to-image recall@1"] == pytest.approx(1 / 3)
    assert found["text-to-image recall@5"] == 1
    # Divided by the means 0.4, 0.433 and 0.0233: image 0 has 1, 1.38, 0.43; image 1 has 0.75, 0.46,
    # 0.86; image 2 has 1.25, 1.15, 1.71.
    assert found["image-to-text recall@1"] == pytest.approx(1 / 3)


def test_recall_at_five():
    """The right one at rank 5 counts for recall@5, at rank 6 only for recall@10; ties are lost."""
    scores = torch.zeros(7, 7)
    scores[1:5, 0] = scores[[0, 2, 3, 4, 5], 1] = 1.0
    scores[0, 0] = scores[1, 1] = scores[6, 6] = 0.5
    ranks = [5, 6, 7, 7, 7, 7, 1]  # of the image of each caption
    found = recall(scores)
    assert found["text-to-image recall@1"] == pytest.approx(ranks.count(1) / 7)
    assert found["text-to-image recall@5"] == pytest.approx(2 / 7)
    assert found["text-to-image recall@10"] == 1


def test_retrieval_of_a_model(shared_dataset):
    """The recalls are those of `CaptionModel.score` for the first caption of each image."""
    data = CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")
    model = tiny_model()
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)
    scores = model.score(data.paths, [texts[0] for texts in data.captions])
    found = retrieval(model, ImageDataset(data, model.transform))
    assert found == pytest.approx({"retrieval images": len(data), **recall(scores)})
    alone = model.score(data.paths[3], data.captions[5][0])
    torch.testing.assert_close(alone, scores[3:4, 5:6], atol=1e-3, rtol=1e-3)
