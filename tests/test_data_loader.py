"""From captions to batches: samplers, collation, and the three loaders."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CAPTIONS

from captioning.data.coco import CocoCaptions
from captioning.data.images import eval_transform
from captioning.learning.losses import TeacherForcing
from data_loader import (
    BucketSampler,
    CaptionDataset,
    ImageGroupedSampler,
    get_loader,
    image_loader,
    train_loader,
    val_loader,
)
from model import CaptionModel, ModelConfig
from vocabulary import Vocabulary

TEXTS = [caption for captions in CAPTIONS for caption in captions]
LENGTHS = np.arange(50) % 3 + 3
IMAGES = np.repeat(np.arange(20), [1, 2, 3, 4] * 5)  # the image of each of 50 captions
transform = eval_transform(32)


@pytest.fixture(scope="module")
def data(shared_dataset):
    return CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")


@pytest.fixture(scope="module")
def vocab():
    return Vocabulary.build(TEXTS, threshold=1)


def numbers_of(images, data):
    """Which images of `data` these are."""
    numbers = {transform(path).numpy().tobytes(): n for n, path in enumerate(data.paths)}
    return [numbers[image.numpy().tobytes()] for image in images]


def sampler(grouped=False, **options):
    if grouped:
        return ImageGroupedSampler(LENGTHS, IMAGES, batch_size=8, **options)
    return BucketSampler(LENGTHS, batch_size=8, **options)


def epoch_of(sampler, epoch, start=0):
    sampler.set_epoch(epoch, start)
    return [batch.tolist() for batch in sampler]


# ---------------------------------------------------------------------------- samplers

both = pytest.mark.parametrize("grouped", [False, True], ids=["BucketSampler", "ImageGrouped"])


@both
def test_every_caption_once_per_epoch(grouped):
    """An epoch has every caption in exactly one of its batches."""
    batches = epoch_of(sampler(grouped), 3)
    assert len(batches) == len(sampler(grouped)) == (3 if grouped else 7)
    assert sorted(sum(batches, [])) == list(range(50))


@both
def test_seed_and_epoch_decide(grouped):
    """The batches depend on (seed, epoch) alone, and differ between seeds and epochs."""
    first = sampler(grouped, seed=3)
    expected = epoch_of(first, 5)
    np.random.seed(1)
    torch.manual_seed(1)
    other = sampler(grouped, seed=3)
    assert epoch_of(other, 2) != expected
    assert epoch_of(other, 5) == expected
    assert epoch_of(sampler(grouped, seed=4), 5) != expected
    contents = [{frozenset(batch) for batch in epoch_of(first, epoch)} for epoch in (5, 6)]
    assert contents[0] != contents[1]


@both
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch(grouped, world_size):
    """The parts of all ranks together are the batches of a single process."""
    shares = [
        epoch_of(sampler(grouped, rank=rank, world_size=world_size), 1)
        for rank in range(world_size)
    ]
    together = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in epoch_of(sampler(grouped), 1)]


@both
def test_start_within_an_epoch(grouped):
    """`start` skips the first batches of an epoch, and the others stay as they are."""
    assert epoch_of(sampler(grouped), 3, start=2) == epoch_of(sampler(grouped), 3)[2:]


def test_all_captions_of_an_image_are_in_one_batch():
    """A batch of the ImageGroupedSampler has all captions of its images, at most batch_size."""
    for batch in epoch_of(sampler(grouped=True), 0):
        images = set(IMAGES[batch])
        assert len(images) <= 8
        assert sorted(batch) == np.flatnonzero(np.isin(IMAGES, list(images))).tolist()


def test_little_padding():
    """With lengths like those of COCO, less than a twentieth of the batches is padding."""
    lengths = np.random.default_rng(0).normal(12.5, 2.4, 5000).round().clip(7, 40).astype(int)
    cells = sum(len(batch) * lengths[batch].max() for batch in BucketSampler(lengths, 64))
    assert lengths.sum() / cells > 0.95


def test_images_of_similar_length():
    """Images in a batch of the ImageGroupedSampler have a similar longest caption."""
    lengths = np.random.default_rng(0).integers(5, 40, 5000)
    image = np.repeat(np.arange(1000), 5)
    longest = lengths.reshape(1000, 5).max(1)
    batches = list(ImageGroupedSampler(lengths, image, 50))
    assert max(np.ptp(longest[np.unique(image[batch])]) for batch in batches) <= 12


@pytest.mark.parametrize("captions, batch_size, world_size", [(9, 8, 8), (65, 64, 64), (3, 8, 4)])
def test_a_part_for_every_process(captions, batch_size, world_size):
    """Batches with too few captions for all processes are an error."""
    lengths = np.full(captions, 5)
    with pytest.raises(ValueError, match="fewer processes"):
        BucketSampler(lengths, batch_size, world_size=world_size)
    assert min(map(len, BucketSampler(lengths, batch_size, rank=1, world_size=2))) > 0


# ---------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mode", ["train", "val"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_every_caption_with_its_image(data, vocab, mode, batch_size):
    """A loader returns every caption exactly once, with its own image."""
    loader = get_loader(data, vocab, mode, transform=transform, batch_size=batch_size)
    found = Counter()
    for images, captions, _ in loader:
        texts = [vocab.decode(caption) for caption in captions]
        found.update(zip(numbers_of(images, data), texts, strict=True))
    assert found == Counter((n, c) for n, texts in enumerate(CAPTIONS) for c in texts)


def test_collation(data, vocab):
    """A batch has its captions as indices, each padded with `<pad>`, and their lengths."""
    indices = [5, 0, 17, 5]
    images, captions, lengths = CaptionDataset(data, vocab, transform).__getitems__(indices)
    encoded = [vocab.encode(TEXTS[index]) for index in indices]
    longest = max(map(len, encoded))
    assert captions.tolist() == [ids + [0] * (longest - len(ids)) for ids in encoded]
    assert lengths.tolist() == [len(ids) for ids in encoded]
    assert (captions.dtype, images.dtype) == (torch.int64, torch.float32)
    assert images.shape == (4, 3, 32, 32)


def test_validation_has_a_fixed_order(data, vocab):
    """Validation batches are the same every time, and ranks share them."""
    order = [captions.tolist() for _, captions, _ in val_loader(data, vocab, transform=transform)]
    assert order == [c.tolist() for _, c, _ in val_loader(data, vocab, transform=transform)]
    whole, *parts = (
        [
            c.tolist()
            for _, c, _ in val_loader(
                data, vocab, transform=transform, batch_size=4, rank=rank, world_size=world_size
            )
        ]
        for rank, world_size in ((0, 1), (0, 2), (1, 2))
    )
    assert [whole[0::2], whole[1::2]] == parts


def test_every_image_once(data):
    """The image loader returns every image once, in order, with its row among the references."""
    batches = list(image_loader(data, transform=transform, batch_size=5))
    rows = torch.cat([rows for _, rows in batches]).tolist()
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, torch.stack([transform(path) for path in data.paths]))
    assert [data.captions[row] for row in rows] == CAPTIONS


@pytest.mark.parametrize("mode", ["train", "val", "test"])
def test_features_instead_of_images(data, vocab, mode, capsys):
    """Given features, batches have those of their images, also if images were left out."""
    smaller = data.without([0, 7])
    features = np.arange(12, dtype=np.float16)[:, None, None, None] * [[[[1, 10]]]]
    with_features = get_loader(smaller, vocab, mode, features=features, batch_size=4)
    with_images = get_loader(smaller, vocab, mode, transform=transform, batch_size=4)
    for (found, *rest), (images, *same) in zip(with_features, with_images, strict=True):
        assert found.tolist() == [[[[n, 10 * n]]] for n in numbers_of(images, data)]
        assert found.dtype == torch.float32
        assert all(torch.equal(one, other) for one, other in zip(rest, same, strict=True))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_grouped_images(data, vocab, batch_size):
    """With `group_images`, a batch has each image once, and the index of each caption's image."""
    loader = train_loader(
        data, vocab, transform=transform, batch_size=batch_size, group_images=True
    )
    found = Counter()
    for images, captions, lengths, image_index in loader:
        numbers = numbers_of(images, data)
        assert len(set(numbers)) == len(numbers) <= batch_size
        assert set(image_index.tolist()) == set(range(len(numbers)))
        assert lengths.tolist() == (captions != 0).sum(1).tolist()
        found.update(
            (numbers[i], vocab.decode(c)) for i, c in zip(image_index, captions, strict=True)
        )
    assert found == Counter((n, c) for n, texts in enumerate(CAPTIONS) for c in texts)


def test_loss_of_grouped_images(data, vocab):
    """Grouping images changes neither the loss of an epoch nor its gradient."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="shufflenet_v2_x0_5",
        image_size=64,
        embed_size=8,
        hidden_size=8,
        dropout=0.0,
        precision="float32",
    )
    model = CaptionModel(vocab.words, config, weights=None)
    features = np.random.default_rng(0).normal(size=(12, 1, 1, model.encoder.feature_size))
    features = features.astype(np.float32)
    loss, results = TeacherForcing(model, precomputed=True), []
    for group_images in (False, True):
        loader = train_loader(
            data, vocab, features=features, batch_size=5, group_images=group_images
        )
        nll, tokens = map(sum, zip(*(loss(*batch) for batch in loader), strict=True))
        weights = [model.encoder.linear.weight, model.decoder.embedding.weight]
        results.append([nll.detach(), tokens, *torch.autograd.grad(nll, weights)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_unknown_mode(data, vocab):
    """An unknown mode is an error that lists the known ones."""
    with pytest.raises(ValueError, match="'valid'.*train, val, test"):
        get_loader(data, vocab, "valid", transform=transform)


def test_random_view(data, vocab):
    """Training draws each of an image's views; a batch of validation contains all of them."""
    features = np.array([[[[n]], [[100 + n]]] for n in range(12)], np.float16)
    loader = train_loader(data, vocab, features=features)
    drawn = torch.cat([images for _ in range(20) for images, *_ in loader])
    assert drawn.shape[1:] == (1, 1, 1)
    assert set(drawn.flatten().tolist()) == {*range(12), *range(100, 112)}
    images, *_ = next(iter(val_loader(data, vocab, features=features)))
    torch.testing.assert_close(images[:, 1], images[:, 0] + 100)
    assert set(images[:, 0].flatten().tolist()) == set(range(12))


@pytest.mark.parametrize("group_images", [False, True])
def test_random_crop(data, vocab, group_images):
    """Training draws the views of the images and of their crops, all of them equally often."""
    arrays = [
        np.array([[[[n + 20 * v]] for v in (i, i + 1)] for n in range(12)], np.float16)
        for i in (0, 2, 4)
    ]
    loader = train_loader(
        data, vocab, features=arrays[0], crops=arrays[1:], group_images=group_images
    )
    torch.manual_seed(0)
    counts = np.zeros((12, 6))
    for _ in range(300):
        for batch in loader:
            rows = batch[3] if group_images else torch.arange(len(batch[1]))
            assert batch[0].shape[1:] == (1, 1, 1)
            for value in batch[0].flatten()[rows].int().tolist():
                counts[value % 20, value // 20] += 1
    captions = [len(of_image) for of_image in data.captions]
    np.testing.assert_array_equal(counts.sum(1), np.multiply(300, captions))
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), 1 / 6, atol=0.1)
