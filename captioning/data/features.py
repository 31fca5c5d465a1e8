"""Reading the features of a frozen CNN that extraction.py has computed and cached.

array = FeatureArray(files)             # of every view: array[[7, 3]] is (2, V, P, C) float16
features = Views([array])               # the mean of the views: features[[7, 3]] is (2, P, C)
features = Views([array, crops], random=True)     # a random view of each image, for training

Whatever is indexed by an array of rows and returns (B, P, C) can take their place: a tensor too.
"""

import numpy as np
import torch


class FeatureArray:
    """The features of all images, read from their files when they are indexed.

    The files are read, not memory-mapped: pages of a map would count as memory of the process.
    """

    def __init__(self, files):
        shards = [np.load(file, mmap_mode="r") for file in files]
        self.files, self.offset, self.dtype = list(files), shards[0].offset, shards[0].dtype
        self.shape = (sum(map(len, shards)), *shards[0].shape[1:])
        self.shard_size = len(shards[0])  # of all files but the last

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """An array (B,) of integers -> (B, V, P, C) float16."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.tolist()} of {len(self)} images")
        features = np.empty((len(rows), *self.shape[1:]), self.dtype)
        size, shard = features[:1].nbytes, rows // self.shard_size
        for number in np.unique(shard):
            with open(self.files[number], "rb", buffering=0) as file:
                for index in np.flatnonzero(shard == number):
                    file.seek(self.offset + int(rows[index]) % self.shard_size * size)
                    if file.readinto(features[index]) != size:
                        raise OSError(f"{self.files[number]} is shorter than when it was opened")
        return features


class Views:
    """One (P, C) of each image, from features of several views of it.

    arrays: of shape (N, V, P, C), indexed by an array of rows: the whole image (and its flip), and
        then, for training, random crops of it.
    random: draw one of all the views each time, as augmentation; otherwise, the mean of those in
        the first array.
    """

    def __init__(self, arrays, random=False):
        self.arrays, self.random = list(arrays), random

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, rows):
        """(B,) rows -> (B, P, C) float32."""
        if len(self.arrays) == self.arrays[0].shape[1] == 1:  # the only view
            return torch.from_numpy(self.arrays[0][rows][:, 0]).float()
        if self.random:
            return torch.from_numpy(self.draw(rows)).float()
        return torch.from_numpy(self.arrays[0][rows]).float().mean(1)

    def draw(self, rows):
        """A random view of each image: (B,) rows -> (B, P, C)."""
        _, count, *shape = self.arrays[0].shape
        drawn = torch.randint(count * len(self.arrays), (len(rows),)).numpy()
        number, view = np.divmod(drawn, count)
        views = np.empty((len(rows), *shape), self.arrays[0].dtype)
        for i, array in enumerate(self.arrays):
            chosen = np.flatnonzero(number == i)
            views[chosen] = array[rows[chosen]][np.arange(len(chosen)), view[chosen]]
        return views


class PerModel:
    """The features for each model of an ensemble: rows (B,) -> a tuple of (B, P, C)."""

    def __init__(self, features):
        self.features = list(features)

    def __getitem__(self, rows):
        return tuple(features[rows] for features in self.features)
