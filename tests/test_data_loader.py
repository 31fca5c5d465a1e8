"""From captions to batches: samplers, datasets, collation, and the loader."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CAPTIONS
from torch.utils.data import Dataset

from captioning.data.coco import CocoCaptions
from captioning.data.images import eval_transform
from data_loader import BucketSampler, CaptionDataset, ImageDataset, ImageGroupedSampler, get_loader
from vocabulary import PAD, Vocabulary

TEXTS = [caption for captions in CAPTIONS for caption in captions]
PAIRS = Counter((n, text) for n, texts in enumerate(CAPTIONS) for text in texts)
LENGTHS = np.arange(50) % 3 + 3
IMAGES = np.repeat(np.arange(20), [1, 2, 3, 4] * 5)  # the image of each of 50 captions
FEATURES = torch.arange(12.0)[:, None, None] * torch.tensor([1.0, 10.0])  # (12, 1, 2)
transform = eval_transform(32)


@pytest.fixture(scope="module")
def data(shared_dataset):
    return CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")


@pytest.fixture(scope="module")
def vocab():
    return Vocabulary.build(TEXTS, threshold=1)


def sampler(grouped=False, **options):
    if grouped:
        return ImageGroupedSampler(LENGTHS, IMAGES, batch_size=12, **options)  # 5 images
    return BucketSampler(LENGTHS, batch_size=8, **options)


def epoch_of(sampler, epoch, start=0):
    sampler.set_epoch(epoch, start)
    return [batch.tolist() for batch in sampler]


# ---------------------------------------------------------------------------- samplers

both = pytest.mark.parametrize("grouped", [False, True], ids=["BucketSampler", "ImageGrouped"])


@both
def test_every_caption_once_per_epoch(grouped):
    """An epoch has every caption in exactly one of its batches, which have about the same size."""
    batches = epoch_of(sampler(grouped), 3)
    assert len(batches) == len(sampler(grouped)) == (4 if grouped else 7)
    assert sorted(sum(batches, [])) == list(range(50))


@both
def test_seed_and_epoch_decide(grouped):
    """The batches depend on (seed, epoch) alone, and differ between seeds and epochs; `start` skips
    the first ones.
    """
    first = sampler(grouped, seed=3)
    expected = epoch_of(first, 5)
    np.random.seed(1)
    torch.manual_seed(1)
    other = sampler(grouped, seed=3)
    assert epoch_of(other, 2) != expected
    assert epoch_of(other, 5, start=2) == expected[2:] and epoch_of(other, 5) == expected
    assert epoch_of(sampler(grouped, seed=4), 5) != expected
    contents = [{frozenset(batch) for batch in epoch_of(first, epoch)} for epoch in (5, 6)]
    assert contents[0] != contents[1]


@both
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch(grouped, world_size):
    """The parts of all ranks together are the batches of a single process."""
    samplers = (sampler(grouped, rank=rank, world_size=world_size) for rank in range(world_size))
    shares = [epoch_of(share, 1) for share in samplers]
    together = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in epoch_of(sampler(grouped), 1)]


def test_all_captions_of_an_image_are_in_one_batch():
    """A batch of the ImageGroupedSampler has all captions of its images, about batch_size."""
    for batch in epoch_of(sampler(grouped=True), 0):
        images = set(IMAGES[batch])
        assert len(images) == 5  # with 2.5 captions on average
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
    batches = list(ImageGroupedSampler(lengths, image, 250))
    assert max(np.ptp(longest[np.unique(image[batch])]) for batch in batches) <= 12


@pytest.mark.parametrize("captions, batch_size, world_size", [(9, 8, 8), (65, 64, 64), (3, 8, 4)])
def test_a_part_for_every_process(captions, batch_size, world_size):
    """Batches with too few captions for all processes are an error."""
    lengths = np.full(captions, 5)
    with pytest.raises(ValueError, match="fewer processes"):
        BucketSampler(lengths, batch_size, world_size=world_size)
    assert min(map(len, BucketSampler(lengths, batch_size, rank=1, world_size=2))) > 0


# ---------------------------------------------------------------------------- batches


class Items(Dataset):
    """The items of a dataset without its methods and attributes, as a dataset of one's own."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, caption, features = self.dataset[index]
        if features is None:
            return image, caption.int().numpy()
        return None, caption.tolist(), features


@pytest.fixture(scope="module")
def numbers_of(data):
    """A function: the number of each image of a batch, in `data`."""
    numbers = {transform(path).numpy().tobytes(): n for n, path in enumerate(data.paths)}

    def find(batch):
        if batch.images is None:
            assert (batch.features[:, 0, 1] == 10 * batch.features[:, 0, 0]).all()
            return batch.features[:, 0, 0].int().tolist()
        return [numbers[image.numpy().tobytes()] for image in batch.images]

    return find


@pytest.mark.parametrize("own", [False, True], ids=["CaptionDataset", "a dataset of one's own"])
@pytest.mark.parametrize(
    "inputs", [{"transform": transform}, {"features": FEATURES}], ids=["images", "features"]
)
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_every_caption_with_its_image(data, vocab, numbers_of, own, inputs, batch_size):
    """In all modes, an epoch has every caption once, with its own image or its features."""
    dataset = CaptionDataset(data, vocab, **inputs)
    modes = [("train", {}), ("val", {})] + [("train", {"group_images": True})] * (not own)
    for mode, options in modes:
        found, wrapped = Counter(), Items(dataset) if own else dataset
        for batch in get_loader(wrapped, mode, batch_size, **options):
            numbers, index = numbers_of(batch), batch.image_index.tolist()
            assert set(index) == set(range(len(numbers)))
            assert own or len(set(numbers)) == len(numbers)  # each image once
            assert batch.lengths.tolist() == (batch.captions != PAD).sum(1).tolist()
            texts = map(vocab.decode, batch.captions)
            found.update((numbers[i], text) for i, text in zip(index, texts, strict=True))
        assert found == PAIRS


@pytest.mark.parametrize("own", [False, True], ids=["CaptionDataset", "a dataset of one's own"])
def test_collation(data, vocab, own):
    """A batch has its captions as indices, each padded with `<pad>`, and their lengths."""
    rows = [5, 0, 17, 5]
    dataset = CaptionDataset(data, vocab, transform)
    dataset = torch.utils.data.Subset(Items(dataset) if own else dataset, rows)
    (batch,) = get_loader(dataset, "val")
    encoded = [vocab.encode(TEXTS[row]) for row in rows]
    longest = max(map(len, encoded))
    assert batch.captions.tolist() == [ids + [PAD] * (longest - len(ids)) for ids in encoded]
    assert batch.lengths.tolist() == [len(ids) for ids in encoded]
    assert (batch.captions.dtype, batch.images.dtype) == (torch.int64, torch.float32)
    assert batch.images[batch.image_index].shape == (4, 3, 32, 32)


def test_validation_has_a_fixed_order(data, vocab):
    """Validation batches are in the order of the captions, and ranks share them."""
    dataset = CaptionDataset(data, vocab, features=FEATURES)
    whole, *parts = (
        [
            [vocab.decode(caption) for caption in batch.captions]
            for batch in get_loader(dataset, "val", 4, rank=rank, world_size=world_size)
        ]
        for rank, world_size in ((0, 1), (0, 2), (1, 2))
    )
    assert sum(whole, []) == TEXTS
    assert [whole[0::2], whole[1::2]] == parts


def test_every_image_once(data):
    """A loader of an ImageDataset has every image once, in order, and so have its items."""
    dataset = ImageDataset(data, transform)
    expected = torch.stack([transform(path) for path in data.paths])
    batches = list(get_loader(dataset, "val", 5))
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    assert torch.equal(torch.stack([item.image for item in dataset]), expected)
    assert len(dataset) == 12 and batches[0].captions is None


def test_unknown_mode(data, vocab):
    """An unknown mode is an error that lists the known ones."""
    with pytest.raises(ValueError, match="'valid'.*train or val"):
        get_loader(CaptionDataset(data, vocab, transform), "valid")
