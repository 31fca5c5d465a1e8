"""Datasets, samplers and loaders: from a COCO captions file to batches.

data = CocoCaptions("train2017", "annotations/captions_train2017.json")
loader = train_loader(data, vocab, transform=eval_transform(224), batch_size=64)
for images, captions, lengths in loader:     # (B, 3, 224, 224), (B, T), (B,)
    ...

With `features` (features.py) the batches contain precomputed views of the images, (B, V, P, C) or
(B, V, C, H, W), instead of images.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from captioning.base.files import atomic_write
from captioning.base.tokens import END, PAD, START, TOKENIZER, tokenize
from captioning.data.coco import CocoCaptions
from vocabulary import Vocabulary

# ---------------------------------------------------------------------------- tokenized captions


@dataclass
class TokenizedCaptions:
    """The words of many captions in three arrays, which are fast to load and to map to indices."""

    words: list[str]  # the distinct words
    ids: np.ndarray  # (total number of words,) int32: indices into `words`, caption after caption
    lengths: np.ndarray  # (captions,) int32, in words

    def counts(self) -> dict[str, int]:
        """How often each word occurs."""
        return dict(zip(self.words, np.bincount(self.ids).tolist(), strict=True))

    def encode(self, vocab: Vocabulary):
        """`vocab.encode` of every caption: (all indices, caption after caption; the lengths).

        The lengths include `<start>` and `<end>`.
        """
        lengths = self.lengths.astype(np.int64) + 2
        ends = np.cumsum(lengths)
        ids = np.empty(lengths.sum(), np.int32)
        is_word = np.ones(len(ids), bool)
        is_word[ends - lengths] = is_word[ends - 1] = False
        ids[ends - lengths], ids[ends - 1] = START, END
        ids[is_word] = np.array([vocab(word) for word in self.words], np.int32)[self.ids]
        return ids, lengths


def tokenize_all(captions: list[str], cache_dir=None) -> TokenizedCaptions:
    """Tokenize captions, or load the tokenized captions from `cache_dir`, where they are kept.

    The file name contains a hash of the captions and the tokenizer; a damaged file is replaced.
    """
    if cache_dir is None:
        return _tokenize_all(captions)
    digest = hashlib.sha256(json.dumps([TOKENIZER, *captions]).encode())
    path = Path(cache_dir) / f"captions-{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(path) as file:  # a zip file, whose checksums detect damage; never a pickle
            words = file["words"].tobytes().decode()
            return TokenizedCaptions(
                words.split("\n") if words else [], file["ids"], file["lengths"]
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        tokenized = _tokenize_all(captions)
    words = np.frombuffer("\n".join(tokenized.words).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, words=words, ids=tokenized.ids, lengths=tokenized.lengths)
    return tokenized


def _tokenize_all(captions) -> TokenizedCaptions:
    index, ids, lengths = {}, [], []
    for caption in captions:
        words = tokenize(caption)
        ids += [index.setdefault(word, len(index)) for word in words]
        lengths.append(len(words))
    return TokenizedCaptions(list(index), np.array(ids, np.int32), np.array(lengths, np.int32))


# ---------------------------------------------------------------------------- datasets


class ImageDataset(Dataset):
    """Every image of `data` once: (images, rows of `data`).

    features: an array (or `features.FeatureArray`) (N, V, P, C) or (N, V, C, H, W), indexed by
        `data.indices`, used in place of the images; otherwise an image is `transform(path)`.
    random_view: of the V views of an image, which are the image and its horizontal flip, draw one
        at random each time, as augmentation; otherwise a batch contains all of them.
    crops: arrays like `features`, of crops of the images. A random view is one of those in
        `features` and in all of `crops`.
    """

    def __init__(
        self, data: CocoCaptions, transform=None, features=None, random_view=False, crops=()
    ):
        self.data, self.transform, self.features = data, transform, features
        self.random_view, self.arrays = random_view, [features, *crops]
        self.indices = np.array(data.indices)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, rows):
        """A whole batch at once: (B, 3, H, W) or (B, V, ...), and (B,)."""
        return self.images(np.asarray(rows)), torch.as_tensor(rows)

    def images(self, rows):
        """(B,) rows of `data` -> their views (B, V, ...) float32, or images (B, 3, H, W)."""
        if self.features is not None:
            indices = self.indices[rows]
            views = self.draw_views(indices) if self.random_view else self.features[indices]
            return torch.from_numpy(views).float()
        return torch.stack([self.transform(self.data.paths[row]) for row in rows])

    def draw_views(self, indices):
        """(B,) indices of images -> a random view of each, (B, 1, ...)."""
        count = self.features.shape[1]  # views per array
        if count * len(self.arrays) == 1:
            return self.features[indices]
        drawn = torch.randint(count * len(self.arrays), (len(indices),)).numpy()
        number, view = np.divmod(drawn, count)
        views = np.empty((len(indices), 1, *self.features.shape[2:]), self.features.dtype)
        for i, array in enumerate(self.arrays):
            rows = np.flatnonzero(number == i)
            views[rows, 0] = array[indices[rows]][np.arange(len(rows)), view[rows]]
        return views


class CaptionDataset(ImageDataset):
    """Every caption of `data` with its image; all captions are kept in one integer array.

    group_images: an image with several captions in a batch is loaded once, see `__getitems__`.
    """

    def __init__(
        self,
        data,
        vocab,
        transform=None,
        features=None,
        cache_dir=None,
        group_images=False,
        random_view=False,
        crops=(),
    ):
        super().__init__(data, transform, features, random_view, crops)
        self.ids, self.lengths = tokenize_all(data.all_captions, cache_dir).encode(vocab)
        self.ends = np.cumsum(self.lengths)
        # (number of captions,): the row of `data` with the image of each caption
        self.image_rows = np.repeat(np.arange(len(data)), [len(c) for c in data.captions])
        self.group_images = group_images

    def __len__(self):
        return len(self.lengths)

    def __getitems__(self, indices):
        """A whole batch at once: images, captions (B, T) padded with `<pad>`, lengths (B,).

        With `group_images`, also the index (B,) of each caption's image in `images`.
        """
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        captions = np.full((len(indices), lengths.max()), PAD, dtype=np.int64)
        is_token = np.arange(captions.shape[1]) < lengths[:, None]
        starts = np.repeat(self.ends[indices] - lengths, lengths)
        offsets = np.concatenate([np.arange(length) for length in lengths])
        captions[is_token] = self.ids[starts + offsets]
        captions, lengths = torch.from_numpy(captions), torch.from_numpy(lengths)
        if not self.group_images:
            return self.images(self.image_rows[indices]), captions, lengths
        rows, image_index = np.unique(self.image_rows[indices], return_inverse=True)
        return self.images(rows), captions, lengths, torch.from_numpy(image_index)


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
    """Batches of `batch_size` images, each with all its captions.

    The CNN's forward pass is then computed once per image instead of once per caption. The images
    of a batch have longest captions of similar length.
    """

    def __init__(self, lengths, image_rows, batch_size, seed=0, rank=0, world_size=1):
        """lengths, image_rows: (captions,), of a `CaptionDataset`; image by image."""
        self.starts = np.flatnonzero(np.diff(image_rows, prepend=-1))
        self.stops = np.append(self.starts[1:], len(image_rows))
        longest = np.maximum.reduceat(lengths, self.starts)
        super().__init__(longest, batch_size, seed, rank, world_size)

    def __iter__(self):
        for images in super().__iter__():
            spans = zip(self.starts[images], self.stops[images], strict=True)
            yield np.concatenate([np.arange(start, stop) for start, stop in spans])


# ---------------------------------------------------------------------------- loaders


def train_loader(
    data,
    vocab,
    *,
    transform=None,
    features=None,
    batch_size=64,
    seed=0,
    num_workers=0,
    rank=0,
    world_size=1,
    cache_dir=None,
    group_images=False,
    crops=(),
):
    """(images, captions, lengths): every caption once, reshuffled in each epoch.

    Call `loader.batch_sampler.set_epoch(epoch)` before each epoch. Each rank gets its part of every
    batch of `batch_size` captions, or, with `group_images`, of images (and an index, see
    `CaptionDataset`). `cache_dir` keeps the tokenized captions. Of several views of an image in
    `features` and `crops` (see `ImageDataset`), one is drawn at random.
    """
    dataset = CaptionDataset(
        data, vocab, transform, features, cache_dir, group_images, random_view=True, crops=crops
    )
    if group_images:
        batches = ImageGroupedSampler(
            dataset.lengths, dataset.image_rows, batch_size, seed, rank, world_size
        )
    else:
        batches = BucketSampler(dataset.lengths, batch_size, seed, rank, world_size)
    return _loader(dataset, batches, num_workers, seed)


def val_loader(
    data,
    vocab,
    *,
    transform=None,
    features=None,
    batch_size=64,
    num_workers=0,
    rank=0,
    world_size=1,
    cache_dir=None,
    group_images=False,
):
    """(images, captions, lengths): every caption once, in a fixed order of similar lengths.

    Each rank gets every `world_size`-th batch. With `group_images`, the order is that of the
    images, each of which is loaded once, and a batch has an index too, see `CaptionDataset`.
    """
    dataset = CaptionDataset(data, vocab, transform, features, cache_dir, group_images)
    order = np.argsort(dataset.lengths, kind="stable")
    if group_images:
        order = np.arange(len(dataset))
    batches = np.split(order, range(batch_size, len(order), batch_size))[rank::world_size]
    return _loader(dataset, batches, num_workers)


def image_loader(
    data, *, transform=None, features=None, batch_size=64, num_workers=0, rank=0, world_size=1
):
    """(images, rows): every image once, in order; `data.captions[row]` are its references.

    Each rank gets every `world_size`-th image.
    """
    dataset = ImageDataset(data, transform, features)
    rows = range(rank, len(dataset), world_size)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return _loader(dataset, batches, num_workers)


def get_loader(data, vocab=None, mode="train", **options):
    """`train_loader`, `val_loader` or `image_loader` ("test"), selected by `mode`.

    Raises ValueError for an unknown mode.
    """
    if mode == "test":
        return image_loader(data, **options)
    if mode not in ("train", "val"):
        raise ValueError(f"unknown mode {mode!r}; choose from train, val, test")
    return (train_loader if mode == "train" else val_loader)(data, vocab, **options)


def _loader(dataset, batches, num_workers, seed=0):
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=identity_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


def identity_collate(batch):
    """For datasets that return whole batches; unlike a lambda, it can be pickled for workers."""
    return batch
