"""Datasets, samplers and loaders: from a COCO captions file to batches.

    data = CocoCaptions("train2017", "annotations/captions_train2017.json")
    dataset = CaptionDataset(data, vocab, transform=eval_transform(224))
    for batch in get_loader(dataset, "train", batch_size=64):
        batch.images, batch.captions, batch.lengths     # (M, 3, 224, 224), (B, T), (B,)
        batch.images[batch.image_index]                 # (B, 3, 224, 224), one per caption

Any other Dataset works too if its items are (image, caption), or (None, caption, features): a
tensor (3, H, W), the word indices of the caption (`Vocabulary.encode`), features (P, C) of a CNN.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from captioning.base.tokens import PAD
from captioning.data.workers import WorkerLoader


class Batch(NamedTuple):
    """Captions and their images; a `CaptionDataset` has each image once, however many captions."""

    images: Tensor | None  # (M, 3, H, W); None if there are features in their place
    captions: Tensor | None  # (B, T) word indices with <start> and <end>, padded with <pad>
    lengths: Tensor | None  # (B,) of the captions, in tokens
    image_index: Tensor | None  # (B,) the row of `images` or `features` for each caption
    features: Tensor | None = None  # (M, P, C), computed by the CNN; of an ensemble, a tuple


class Example(NamedTuple):
    """An item of a dataset: one caption with its image, or with the features of its image."""

    image: Tensor | None  # (3, H, W)
    caption: Tensor | None  # (T,)
    features: Tensor | None = None  # (P, C)


# ---------------------------------------------------------------------------- datasets


class ImageDataset(Dataset):
    """Every image of `data` once, without captions.

    data: a `CocoCaptions`. features: of its images, in place of `transform(path)`: anything that an
    array of row numbers (B,) indexes to (B, P, C), such as `captioning.data.features.Views`.
    """

    def __init__(self, data, transform=None, features=None):
        self.data, self.transform, self.features = data, transform, features

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        images, features = self.inputs(np.array([row]))
        return Example(*(None if x is None else x[0] for x in (images, None, features)))

    def __getitems__(self, rows):
        """A whole batch at once."""
        images, features = self.inputs(np.asarray(rows))
        return Batch(images, None, None, None, features)

    def inputs(self, rows):
        """(B,) rows of `data` -> (images or None, features or None)."""
        if self.features is not None:
            return None, self.features[rows]
        return torch.stack([self.transform(self.data.paths[row]) for row in rows]), None


class CaptionDataset(ImageDataset):
    """Every caption of `data` with its image; the captions are kept in one integer array."""

    def __init__(self, data, vocab, transform=None, features=None):
        super().__init__(data, transform, features)
        captions = [np.array(vocab.encode(text), np.int32) for text in data.all_captions]
        self.lengths, self.ids = np.array([len(ids) for ids in captions]), np.concatenate(captions)
        self.ends = np.cumsum(self.lengths)
        # (number of captions,): the row of `data` with the image of each caption
        self.image_rows = np.repeat(np.arange(len(data)), [len(c) for c in data.captions])

    def __len__(self):
        return len(self.lengths)

    def caption(self, index):
        """(T,) the word indices of a caption."""
        end = self.ends[index]
        return torch.from_numpy(self.ids[end - self.lengths[index] : end].astype(np.int64))

    def captions_by_image(self):
        """For each image a list of its captions, each a list of word indices."""
        ids = iter(self.caption(index).tolist() for index in range(len(self)))
        return [[next(ids) for _ in captions] for captions in self.data.captions]

    def __getitem__(self, index):
        image, _, features = super().__getitem__(self.image_rows[index])
        return Example(image, self.caption(index), features)

    def __getitems__(self, indices):
        """A whole batch at once; each image is loaded once."""
        rows, image_index = np.unique(self.image_rows[indices], return_inverse=True)
        images, features = self.inputs(rows)
        lengths = self.lengths[indices]
        steps = np.arange(lengths.max())
        places = (self.ends[indices] - lengths)[:, None] + steps  # (B, T) in `ids`
        ids = self.ids[np.minimum(places, len(self.ids) - 1)].astype(np.int64)
        captions = np.where(steps < lengths[:, None], ids, PAD)
        return Batch(images, *map(torch.from_numpy, (captions, lengths, image_index)), features)


def collate(items) -> Batch:
    """A batch of examples, or of (image, caption) pairs; a batch remains as it is."""
    if isinstance(items, Batch):
        return items
    images, captions, features = zip(*(Example(*item) for item in items), strict=True)
    return Batch(
        None if images[0] is None else torch.stack(images),
        pad_sequence(
            [torch.as_tensor(caption, dtype=torch.long) for caption in captions], True, PAD
        ),
        torch.tensor([len(caption) for caption in captions]),
        torch.arange(len(items)),
        None if features[0] is None else torch.stack(features),
    )


# ---------------------------------------------------------------------------- samplers


class BucketSampler:
    """Batches of captions of similar length, which need almost no padding.

    Every caption is in exactly one batch per epoch. The composition and the order of the batches
    depend on (seed, epoch) alone: call `set_epoch` before each epoch, with `start` to begin at a
    later batch. Each of `world_size` ranks gets its part of every batch.

    Raises ValueError if a batch has too few captions for all ranks.
    """

    def __init__(self, lengths, batch_size, seed=0, rank=0, world_size=1):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world_size = rank, world_size
        smallest = len(self.lengths) // max(len(self), 1)
        if smallest < world_size:
            raise ValueError(
                f"{len(self.lengths)} items in batches of at most {batch_size} leave some of "
                f"{world_size} processes without work: use a larger batch_size or fewer processes"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches = np.array_split(order, len(self))  # their sizes differ by at most one
        for batch in rng.permutation(len(batches))[self.start :]:
            yield batches[batch][self.rank :: self.world_size]


class ImageGroupedSampler(BucketSampler):
    """Batches of about `batch_size` captions: images, each with all its captions.

    What is computed per image is then computed once instead of once per caption. The images of a
    batch have longest captions of similar length.
    """

    def __init__(self, lengths, image_rows, batch_size, seed=0, rank=0, world_size=1):
        """lengths, image_rows: (captions,), of a `CaptionDataset`; image by image."""
        self.starts = np.flatnonzero(np.diff(image_rows, prepend=-1))
        self.stops = np.append(self.starts[1:], len(image_rows))
        longest = np.maximum.reduceat(lengths, self.starts)
        images = max(round(batch_size * len(self.starts) / len(lengths)), world_size)
        super().__init__(longest, images, seed, rank, world_size)

    def __iter__(self):
        for images in super().__iter__():
            spans = zip(self.starts[images], self.stops[images], strict=True)
            yield np.concatenate([np.arange(start, stop) for start, stop in spans])


# ---------------------------------------------------------------------------- loader


def get_loader(
    dataset,
    mode="train",
    batch_size=64,
    *,
    group_images=False,
    seed=0,
    num_workers=0,
    rank=0,
    world_size=1,
):
    """A DataLoader of `Batch`.

    mode: "train": every caption once, reshuffled in each epoch, in batches of captions of similar
        length; call `loader.batch_sampler.set_epoch(epoch)` before each epoch. The lengths are
        those in `dataset.lengths`; without such an attribute, batches are random.
        "val": every item once, in order.
    group_images: in training, a batch contains images with all their captions; the dataset has to
        be a `CaptionDataset`.

    Each rank gets its part of every training batch, and every `world_size`-th validation batch.
    Raises ValueError for an unknown mode; while it is read, WorkerError if a worker fails.
    """
    if mode not in ("train", "val"):
        raise ValueError(f"unknown mode {mode!r}; choose train or val")
    ranks = {"rank": rank, "world_size": world_size}
    if mode == "val":
        rows = range(len(dataset))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        batches = batches[rank::world_size]
    elif group_images:
        batches = ImageGroupedSampler(
            dataset.lengths, dataset.image_rows, batch_size, seed, **ranks
        )
    else:
        lengths = getattr(dataset, "lengths", np.zeros(len(dataset)))
        batches = BucketSampler(lengths, batch_size, seed, **ranks)
    return WorkerLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )
