"""Features that are read back from files: arrays of them, views, and their choice in training."""

import numpy as np
import pytest
import torch

from captioning.data.features import FeatureArray, PerModel, Views


def numbered(count, *offsets):
    """(count, V, 1, 1): the only feature of view v of image n is n + offsets[v]."""
    return (np.arange(count)[:, None] + offsets)[..., None, None].astype(np.float16)


def test_feature_array(tmp_path):
    """A FeatureArray over several files is indexed like the array of all its rows."""
    expected = np.random.default_rng(0).normal(size=(17, 2, 1, 3)).astype(np.float16)
    files = [tmp_path / f"{start}.npy" for start in (0, 5, 10, 15)]
    for number, file in enumerate(files):
        np.save(file, expected[5 * number : 5 * number + 5])
    array = FeatureArray(files)
    assert (len(array), array.shape, array.dtype) == (17, expected.shape, np.float16)
    for rows in ([5, 0, 16, 4, 0], [], range(3, 17, 3)):
        np.testing.assert_array_equal(array[rows], expected[list(rows)])
    for row in (17, -1):
        with pytest.raises(IndexError):
            array[[row]]
    files[1].write_bytes(files[1].read_bytes()[:-20])
    with pytest.raises(OSError, match="shorter than when it was opened"):
        array[[9]]


def test_mean_of_the_views():
    """Without `random`, the features of an image are the mean of the views of the first array."""
    views = Views([numbered(12, 0, 100), numbered(12, 7, 7)])
    found = views[np.array([3, 0, 3])]
    assert found.dtype == torch.float32 and found.tolist() == [[[53]], [[50]], [[53]]]


def test_random_views():
    """With `random`, the views of the images and of their crops are drawn equally often."""
    views = Views([numbered(3, 0, 10), numbered(3, 20, 30), numbered(3, 40, 50)], random=True)
    torch.manual_seed(0)
    rows = np.arange(3000) % 3
    drawn = views[rows].flatten().int().numpy()
    assert (drawn % 10 == rows).all()
    counts = np.bincount(drawn // 10 + 6 * rows, minlength=18)
    np.testing.assert_allclose(counts / 1000, 1 / 6, atol=0.05)


def test_an_ensemble():
    """An ensemble has features for each of its models."""
    features = PerModel([Views([numbered(4, 0)]), Views([numbered(4, 20)])])
    assert [x.flatten().tolist() for x in features[np.array([2, 1])]] == [[2, 1], [22, 21]]
