"""CIDEr-D of word indices, as the reward of self-critical training.

reward = CiderD(references)                    # of all training images
reward(samples, references_of_the_batch)       # (B, S), one per sample

pycocoevalcap, which computes the CIDEr-D that is reported, counts document frequencies in the
references it is given, so it cannot score a batch. Here they are counted once, in the training
references. The formula is the same (Vedantam et al., 2015, arXiv:1411.5726).
"""

import math
from collections import Counter

import numpy as np

from captioning.base.tokens import PAD, START

SIGMA = 6.0  # of the Gaussian penalty of a difference in length, in words


class CiderD:
    """CIDEr-D, between 0 and 10, with the document frequencies of a set of references.

    `<end>` counts as a word. Otherwise a caption that breaks off, as in "a man with a", loses
    nothing, and a model that is trained with this reward learns to write such captions (Hu et al.,
    2023, arXiv:2305.12254).
    """

    def __init__(self, references, n=4):
        """references: for each image, a list of captions, each a list of word indices.

        Raises ValueError for a single image, with which every reward is 0.
        """
        if len(references) < 2:
            raise ValueError("CIDEr-D as a reward needs captions of at least two training images")
        self.n, self.images = n, len(references)
        frequency = Counter()
        for captions in references:
            frequency.update({gram for caption in captions for gram in self.ngrams(caption)})
        # An n-gram that occurs nowhere has the weight of one that occurs once.
        self.frequency = {gram: count for gram, count in frequency.items() if count > 1}

    def ngrams(self, caption):
        """How often each n-gram of lengths 1 to n occurs in a caption."""
        words = [word for word in caption if word not in (PAD, START)]
        grams = [words[i:] for i in range(self.n)]
        return Counter(gram for i in range(self.n) for gram in zip(*grams[: i + 1], strict=False))

    def vector(self, caption):
        """({n-gram: tf-idf weight}, their norms (n,) for each n, the number of bigrams)."""
        weights, squares, length = {}, np.zeros(self.n), 0
        for gram, count in self.ngrams(caption).items():
            weight = count * math.log(self.images / self.frequency.get(gram, 1))
            weights[gram] = weight
            squares[len(gram) - 1] += weight**2
            length += count * (len(gram) == 2)
        return weights, np.sqrt(squares), length

    def similarity(self, sample, reference):
        """The mean over n of the cosines of two vectors, with less for a different length."""
        (weights, norms, length), (others, other_norms, other_length) = sample, reference
        products = np.zeros(self.n)
        for gram, weight in weights.items():
            other = others.get(gram, 0.0)  # more repetitions than in the reference gain nothing
            products[len(gram) - 1] += min(weight, other) * other
        norms = norms * other_norms
        cosines = np.divide(products, norms, out=np.zeros(self.n), where=norms > 0)
        return cosines.mean() * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))

    def __call__(self, samples, references) -> np.ndarray:
        """(B, S) scores of S samples for each of B images, against the references of the image.

        samples, references: for each image a list of captions, each a list of word indices up to
        `<end>`; `<pad>` and `<start>` are ignored.
        """
        rewards = []
        for of_image, captions in zip(samples, references, strict=True):
            vectors = [self.vector(caption) for caption in captions]
            for sample in map(self.vector, of_image):
                rewards.append(10 * np.mean([self.similarity(sample, v) for v in vectors]))
        return np.reshape(rewards, (len(samples), -1))
