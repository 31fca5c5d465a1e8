"""The options of decoding, and the function that all captions come from.

decoded = generate(decoder, features, beam_size=3)
decoded.tokens[:, 0]        # (B, L) the best caption of each image, up to <end>, then <pad>
"""

from dataclasses import dataclass

from captioning.base.options import check_options, option
from captioning.decoding.beam_search import LENGTH_PENALTY, beam_search
from captioning.decoding.decoded import Decoded
from captioning.decoding.sampling import sample


@dataclass(kw_only=True)
class DecodingOptions:
    """How captions are generated: by beam search or, with a temperature, by sampling."""

    beam_size: int | None = option(None, "prefixes per image; default: 3", at_least=1)
    n_best: int = option(1, "captions per image, best first", at_least=1)
    length_penalty: float = option(
        LENGTH_PENALTY, "rank by log-probability / length ** this", at_least=0, below=100
    )
    max_len: int = option(20, "words of a caption, <end> included", at_least=1)
    min_len: int = option(0, "minimum number of words, without <end>", at_least=0)
    temperature: float = option(0.0, "above 0: sample words, without beam search", at_least=0)

    def __post_init__(self):
        check_options(self)
        if self.temperature and not 1e-40 <= self.temperature <= 1e30:  # finite as a float32
            raise ValueError("temperature must be 0 (no sampling), or between 1e-40 and 1e30")
        if self.temperature and (self.beam_size or self.n_best > 1):
            raise ValueError("a temperature samples words: it cannot be combined with a beam")
        if self.min_len >= self.max_len:
            raise ValueError(f"min_len {self.min_len} needs a max_len above it for the <end>")
        if self.beam_size is None and not self.temperature:
            self.beam_size = max(3, self.n_best)
        if self.beam_size and self.n_best > self.beam_size:
            raise ValueError(f"n_best {self.n_best} needs a beam_size at least as large")


def generate(decoder, features, generator=None, **options) -> Decoded:
    """Captions of a batch of images.

    features: what `decoder.memory` takes, one row per image. options: those of `DecodingOptions`,
    which raises ValueError if they contradict each other. generator: a torch.Generator for
    sampling.
    """
    o = DecodingOptions(**options)
    memory = decoder.memory(features)
    if o.temperature:
        return sample(decoder, memory, o.max_len, o.temperature, generator, o.min_len)
    ranking = o.length_penalty, o.n_best, o.min_len
    return beam_search(decoder, memory, o.beam_size, o.max_len, *ranking)
