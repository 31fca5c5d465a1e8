"""How good a caption probably is: the CIDEr-D to expect, without reference captions.

model.confidence = calibrate(model, training_images, validation_images, beam_size=5)
model.confidence(encoded, decoded)              # (B, N), of N captions for each of B images

A caption is probably good if its words are probable, if the captions of similar training images
contain them, and if it does not repeat them. The second is the strongest sign, and it helps to
write captions too: `CaptionModel.generate` makes such words more probable, in the manner of kNN
language models (Khandelwal et al., 2020, arXiv:1911.00172), and ranks the captions of a beam by
their confidence.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from captioning.base.modules import eval_mode
from captioning.base.tokens import SPECIAL_TOKENS
from captioning.decoding.generate import generate
from captioning.scoring.evaluation import score_sources

SPECIAL = set(range(len(SPECIAL_TOKENS)))
BATCH_SIZE = 64
COMPONENTS = 96  # of the features, in which images are compared
NEAREST, SHARPNESS = 20, 10.0  # similar training images; weight: exp(SHARPNESS * cosine)
PRIOR = 0.2  # weight of log(share of similar images' captions / share of all captions)
SMOOTHING, MAX_PRIOR = 0.01, 3.0  # added to both shares; limit of the logarithm
RIDGE = 100.0  # in units of the predictors' variance over all captions


@dataclass
class Confidence:
    """The expected CIDEr-D of captions, a linear function of six predictors.

    All fields are tensors on the CPU. Of each training image there are the words of its captions,
    `counts[n]` entries of image n after those of image n - 1.
    """

    center: torch.Tensor  # (C,) the mean of the training images' features
    basis: torch.Tensor  # (C, D) the principal components of the features, each feature scaled
    images: torch.Tensor  # (N, D) the training images, as unit vectors
    counts: torch.Tensor  # (N,) how many entries an image has
    words: torch.Tensor  # (entries,) word indices
    shares: torch.Tensor  # (entries,) of the image's captions, that have the word
    weight: torch.Tensor  # (6,) of the predictors
    bias: torch.Tensor  # ()

    @classmethod
    def of_images(cls, encoded, captions) -> "Confidence":
        """Not fitted yet. encoded: what the model's `encode` returns for the training images.

        captions: for each image, a list of lists of word indices.
        """
        features = pooled(encoded)  # (N, C)
        center, scale = features.mean(0), features.std(0) + 1e-3
        scaled = (features - center) / scale
        _, components = torch.linalg.eigh(scaled.T @ scaled)  # ascending
        basis = components[:, -COMPONENTS:] / scale.unsqueeze(1)
        integers = torch.zeros(0, dtype=torch.long)
        none = torch.zeros(0, basis.size(1)), integers, integers, torch.zeros(0)
        found = cls(center, basis, *none, torch.zeros(6), torch.zeros(()))
        return found.extended(features, captions)

    def extended(self, encoded, captions) -> "Confidence":
        """With further training images. encoded, captions: as in `of_images`."""
        words, counts, shares = [], [], []
        for texts in captions:
            of_image = Counter(word for text in texts for word in set(text) - SPECIAL)
            counts.append(len(of_image))
            words += of_image
            shares += [count / len(texts) for count in of_image.values()]
        new = {"images": self.project(encoded), "counts": torch.tensor(counts)}
        new |= {"words": torch.tensor(words), "shares": torch.tensor(shares)}
        joined = {name: torch.cat([getattr(self, name), x]) for name, x in new.items()}
        return replace(self, **joined)

    def __post_init__(self):
        rows = torch.arange(len(self.images)).repeat_interleave(self.counts.long())
        entries = torch.stack([self.words.long(), rows])
        size = 1 + int(self.words.max()) if len(self.words) else 1, len(self.images)
        self.word_shares = torch.sparse_coo_tensor(  # (V, N)
            entries, self.shares.float(), size, check_invariants=True
        )

    def fitted(self, predictors, scores) -> "Confidence":
        """With the weights of a ridge regression of scores (M,) on predictors (M, 6)."""
        x, y = predictors.double(), scores.double()
        mean, scale = x.mean(0), x.std(0) + 1e-9
        z = (x - mean) / scale
        identity = torch.eye(z.size(1), dtype=z.dtype)
        weight = torch.linalg.solve(z.T @ z + RIDGE * identity, z.T @ (y - y.mean())) / scale
        bias = y.mean() - mean @ weight
        return replace(self, weight=weight.float(), bias=bias.float())

    def predictors(self, encoded, decoded):
        """(B, N, 6): sum, mean and minimum of a caption's log-probabilities; how far the captions
        of similar images have its words, as a mean and as a sum; and how far it repeats words.
        """
        log_probs, tokens = decoded.log_probs.float().cpu(), decoded.tokens.cpu()  # (B, N, L)
        total, lengths = log_probs.sum(2), log_probs.ne(0).sum(2).clamp(min=1)
        support, idf = self.support(self.similarity(encoded), 1 + int(tokens.max()))
        counts = torch.zeros(*total.shape, len(idf))  # (B, N, V)
        counts.scatter_add_(2, tokens, torch.ones(tokens.shape))
        counts[:, :, : len(SPECIAL_TOKENS)] = 0.0
        present, support = counts.clamp(max=1), support.unsqueeze(1)
        squared = present * idf**2
        agreement = (squared * support).sum(2) / squared.sum(2).clamp(min=1e-6)
        supported = (present * idf * support).sum(2)
        repeated = ((counts - present) * idf).sum(2)
        statistics = total, total / lengths, log_probs.amin(2)
        return torch.stack([*statistics, agreement, supported, repeated], 2)

    def supported(self, decoder) -> "SupportedDecoder":
        return SupportedDecoder(decoder, self)

    def similarity(self, encoded):
        """(B, N) the cosines between images and the training images."""
        return self.project(encoded) @ self.images.T

    def project(self, encoded):
        """(B, D) the principal components of the features, as unit vectors."""
        return F.normalize((pooled(encoded) - self.center) @ self.basis, dim=1)

    def prior(self, encoded, vocab_size):
        """(B, vocab_size) what is added to the logits of the words."""
        support, idf = self.support(self.similarity(encoded), vocab_size)
        ratio = ((support + SMOOTHING) / ((-idf).exp() + SMOOTHING)).log()
        ratio[:, : len(SPECIAL_TOKENS)] = 0.0
        return PRIOR * ratio.clamp(-MAX_PRIOR, MAX_PRIOR)

    def support(self, similarity, vocab_size=0):
        """The share of the captions of similar training images that have a word, (B, V), and the
        words' inverse document frequencies (V,). V is at least `vocab_size`.
        """
        count = len(self.images)
        nearest, index = similarity.topk(min(NEAREST, count))
        weights = torch.zeros_like(similarity).scatter(1, index, (SHARPNESS * nearest).softmax(1))
        frequency = torch.sparse.mm(self.word_shares, torch.full((count, 1), 1 / count)).squeeze(1)
        unseen = 0, max(vocab_size - len(frequency), 0)  # words that no training caption has
        support = torch.sparse.mm(self.word_shares, weights.T).T
        return F.pad(support, unseen), -(F.pad(frequency, unseen) + 1e-4).log()

    def __call__(self, encoded, decoded):
        """(B, N) the expected CIDEr-D of captions, at least 0; -1 where a caption is missing."""
        values = (self.predictors(encoded, decoded) @ self.weight + self.bias).clamp(min=0)
        return values.masked_fill(decoded.scores.cpu() == -torch.inf, -1.0)

    def state(self) -> dict:
        """The fields for a checkpoint: the large ones in half precision."""
        half = {name: getattr(self, name).half() for name in ("basis", "images", "shares")}
        integers = torch.int16 if self.words.max() < 2**15 else torch.int32
        return asdict(self) | half | {"words": self.words.to(integers)}

    @classmethod
    def from_state(cls, state) -> "Confidence":
        return cls(**{name: x.float() if x.is_floating_point() else x for name, x in state.items()})


class SupportedDecoder:
    """A decoder that adds the prior of a `Confidence` to its logits, for decoding.

    Its memory is a tuple, that of the decoder and the prior (B, vocab_size).
    """

    def __init__(self, decoder, confidence):
        self.decoder, self.confidence = decoder, confidence

    def memory(self, features):
        # The sums over thousands of images need float32, whatever the precision of the decoder.
        with torch.autocast("cpu", enabled=False):
            prior = self.confidence.prior(features, self.decoder.linear.out_features)
        return self.decoder.memory(features), prior.to(features.device)

    def init_state(self, memory):
        return self.decoder.init_state(memory[0])

    def step(self, tokens, state, memory):
        logits, state, attention = self.decoder.step(tokens, state, memory[0])
        return logits.float() + memory[1], state, attention


@torch.no_grad()
def calibrate(model, training_images, validation_images, beam_size=5) -> Confidence:
    """A `Confidence` whose weights are fitted to the CIDEr-D of the validation images' captions.

    model: a `CaptionModel`. training_images, validation_images: `data_loader.ImageDataset`s.
    All captions of the beam are used.
    """
    encode, data = model.vocab.encode, validation_images.data
    words = [[encode(text) for text in texts] for texts in training_images.data.captions]
    ranks, predictors, found = [], [], []
    with eval_mode(model):
        features = torch.cat([*map(pooled, encode_images(model, training_images))])
        confidence = Confidence.of_images(features, words)
        decoder = confidence.supported(model.decoder)
        for batch in encode_images(model, validation_images):
            with model.autocast():
                decoded = generate(decoder, batch, beam_size=beam_size, n_best=beam_size)
            predictors.append(confidence.predictors(batch, decoded))
            found.append(decoded.scores.cpu() > -torch.inf)
            ranks += model.decode(decoded)
    captions = [[of[min(n, len(of) - 1)] for of in ranks] for n in range(beam_size)]
    scores = torch.tensor([score_sources(of_rank, data)[1] for of_rank in captions]).T  # (M, N)
    predictors, found = torch.cat(predictors), torch.cat(found)  # (M, N, 6), (M, N)
    confidence = confidence.fitted(predictors[found], scores[found])
    # The captions that are chosen are those whose score is overestimated: fit the scale to them.
    values = predictors @ confidence.weight + confidence.bias
    values = values.masked_fill(~found, -torch.inf)
    best = values.argmax(1, keepdim=True)
    x, y = values.gather(1, best).squeeze(1), scores.gather(1, best).squeeze(1)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    bias = y.mean() + slope * (confidence.bias - x.mean())
    return replace(confidence, weight=slope * confidence.weight, bias=bias)


def encode_images(model, images):
    """Yields what `model.encode` returns for the batches of an `ImageDataset`."""
    for batch in DataLoader(images, BATCH_SIZE, collate_fn=lambda batch: batch):
        with model.autocast():
            encoded = model.encode(batch.images, batch.features)
        yield encoded


def pooled(encoded):
    """(B, C), or (B, P, C) with positions -> (B, C), float32 on the CPU."""
    return (encoded.mean(1) if encoded.dim() == 3 else encoded).float().cpu()
