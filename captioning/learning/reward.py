"""CIDEr-D of token ids, as the reward of self-critical training.

reward = CiderD(dataset.ids, dataset.lengths, dataset.image_rows, len(vocab))   # a CaptionDataset
reward(samples, sample_image, references, reference_image)                 # (S,), one per sample
reward.signature                                                           # how it was computed

pycocoevalcap, which computes the CIDEr-D that is reported, counts document frequencies in the
references it is given, so it cannot score a batch. Here they are counted once, in the training
references. The formula is the same (Vedantam et al., 2015, arXiv:1411.5726).
"""

import numpy as np

from captioning.base.tokens import END, PAD, START


class CiderD:
    """CIDEr-D, between 0 and 10, with the document frequencies of a set of references.

    with_end: count `<end>` as a word, in samples, references and frequencies. Otherwise a caption
        that breaks off, as in "a man with a", loses nothing, and a model that is trained with this
        reward learns to write such captions (Hu et al., 2023, arXiv:2305.12254).
    """

    def __init__(self, ids, lengths, image, vocab_size, n=4, sigma=6.0, with_end=True):
        """ids: the token ids of all references, one reference after another. lengths, image: the
        number of ids and the image of each reference.

        Raises ValueError if `vocab_size` is so large that n-grams do not fit into 64 bits.
        """
        if (vocab_size + 1) ** n >= 2**63:
            raise ValueError(f"{n}-grams of {vocab_size} words do not fit into 64 bits")
        self.base, self.n, self.sigma, self.with_end = vocab_size + 1, n, sigma, with_end
        ids, image = np.asarray(ids), np.asarray(image)
        counted = self.is_counted(ids)
        reference = np.repeat(np.arange(len(lengths)), lengths)[counted]
        keys, reference = self.ngrams(ids[counted], reference)
        self.known, gram = np.unique(keys, return_inverse=True)
        images = len(np.unique(image))
        pairs = np.unique(image[reference].astype(np.int64) * len(self.known) + gram)
        frequency = np.bincount(pairs % len(self.known))  # number of images with the n-gram
        self.idf = np.append(np.log(images / frequency), np.log(images))  # last: unknown n-grams

    @property
    def signature(self) -> str:
        """All settings that change the reward, as one string."""
        end = "included" if self.with_end else "left out"
        return (
            f"CIDEr-D|n:{self.n}|sigma:{self.sigma}|scale:10|df:training images|<end>:{end}"
            "|words:vocabulary with <unk>"
        )

    def __call__(self, samples, sample_image, references, reference_image):
        """The CIDEr-D (S,) of each sample against all references of its image.

        samples: (S, T) token ids up to `<end>`, then `<pad>`. references: (R, T'), the same;
        `<start>` is ignored. sample_image, reference_image: (S,) and (R,), any integers that number
        the images. All are integer arrays. Every sample needs a reference.
        """
        ids, caption, lengths = self.flatten(samples, references)
        caption, gram, weight, order = self.tf_idf(ids, caption)
        vector = caption * self.n + order  # a caption has one vector for each length of n-grams
        norm = np.sqrt(np.bincount(vector, weight**2))[vector]

        # All pairs (a, b) of an n-gram a of a sample and the same n-gram b in a reference of the
        # image: the equal values of `place`.
        image = np.concatenate([sample_image, reference_image]).astype(np.int64)
        place = image[caption] * (gram.max(initial=0) + 1) + gram
        split = np.searchsorted(caption, len(samples))  # the n-grams of the samples come first
        b = split + np.argsort(place[split:], kind="stable")
        first = np.searchsorted(place[b], place[:split], side="left")
        pairs = np.searchsorted(place[b], place[:split], side="right") - first
        a = np.repeat(np.arange(split), pairs)
        b = b[np.arange(len(a)) + np.repeat(first - np.cumsum(pairs) + pairs, pairs)]

        # The minimum: more repetitions than in the reference gain nothing.
        cosine = np.minimum(weight[a], weight[b]) * weight[b] / (norm[a] * norm[b])
        gap = lengths[caption[a]] - lengths[caption[b]]
        total = np.bincount(
            caption[a], cosine * np.exp(-(gap**2) / (2 * self.sigma**2)), len(samples)
        )
        return 10 / self.n * total / np.bincount(reference_image)[sample_image]

    def is_counted(self, ids):
        """Which token ids are words: neither `<pad>` nor `<start>`, and `<end>` as configured."""
        counted = (ids != PAD) & (ids != START)
        return counted if self.with_end else counted & (ids != END)

    def flatten(self, *captions):
        """Padded captions -> ids (N,), the caption of each (N,), the length of each caption."""
        ids, rows, lengths = [], [], []
        for matrix in map(np.asarray, captions):
            counted = self.is_counted(matrix)
            ids.append(matrix[counted])
            rows.append(np.nonzero(counted)[0] + sum(map(len, lengths)))
            lengths.append(counted.sum(1))
        lengths = np.maximum(np.concatenate(lengths) - 1, 0)  # as pycocoevalcap: in bigrams
        return np.concatenate(ids), np.concatenate(rows), lengths

    def ngrams(self, ids, caption):
        """(M,) keys of all n-grams of lengths 1 to n, and the caption (M,) of each.

        A key is a number whose digits, in base vocab_size + 1, are the ids plus 1.
        """
        key, keys, captions = 0, [], []
        for n in range(self.n):
            last = ids[n:].astype(np.int64) + 1
            key = last if n == 0 else key[: len(last)] * self.base + last
            within = caption[n:] == caption[: len(last)]  # does not cross into the next caption
            keys.append(key[within])
            captions.append(caption[: len(last)][within])
        return np.concatenate(keys), np.concatenate(captions)

    def tf_idf(self, ids, caption):
        """The sparse tf-idf vectors of captions: for each of their distinct n-grams its caption
        (in ascending order), a number for the n-gram, its weight (above 0) and its length - 1.
        """
        keys, caption = self.ngrams(ids, caption)
        keys, gram = np.unique(keys, return_inverse=True)
        row = np.searchsorted(self.known, keys)
        found = self.known[np.minimum(row, len(self.known) - 1)] == keys
        idf = self.idf[np.where(found, row, len(self.known))]
        order = np.searchsorted(self.base ** np.arange(1, self.n), keys, side="right")
        size = max(len(keys), 1)
        pairs, count = np.unique(caption * size + gram, return_counts=True)
        caption, gram = pairs // size, pairs % size
        weight = count * idf[gram]
        used = weight > 0  # 0: in the references of every image
        return caption[used], gram[used], weight[used], order[gram[used]]
