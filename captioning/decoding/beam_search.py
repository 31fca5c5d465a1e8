"""Beam search over all images of a batch at once; a beam of one is greedy decoding."""

import torch

from captioning.base.modules import first_tensor, select
from captioning.base.tokens import END, START
from captioning.decoding.decoded import Decoded, word_log_probs

LENGTH_PENALTY = 0.7  # between the sum (0) and the mean (1) of the log-probabilities


@torch.no_grad()
def beam_search(
    decoder, memory, beam_size=3, max_len=20, length_penalty=LENGTH_PENALTY, n_best=1, min_len=0
) -> Decoded:
    """The `n_best` most probable captions that a beam search finds for each image.

    decoder, memory: see `networks.decoder.Decoder`.

    The beam of an image holds the `beam_size` most probable prefixes. A caption that ends leaves
    the beam; the ended captions are ranked by log-probability / length ** length_penalty (Wu et
    al., 2016, arXiv:1609.08144, without their constants), where the length includes `<end>`.
    Prefixes that have not ended after `max_len` tokens rank below all captions that have. No
    caption ends before it has `min_len` words. A model with a `Confidence` ranks the result by that
    (`Captioner.generate`).

    Raises ValueError if the model computes NaN.
    """
    batch, device = len(first_tensor(memory)), first_tensor(memory).device
    images = torch.arange(batch, device=device)  # (A,) whose search goes on
    beam = Decoded.empty(batch, 1, max_len, device)  # A x K prefixes, at first one per image
    beam.scores.zero_()
    best = Decoded.empty(batch, n_best, max_len, device)  # captions that have ended
    words, state = images.new_full((batch,), START), decoder.init_state(memory)
    for t in range(max_len):
        k = beam.scores.size(1)
        logits, state, attention = decoder.step(words, state, memory)  # (A * K, V)
        beam, parent = extend(beam, word_log_probs(logits, t >= min_len), attention, t, beam_size)

        penalized = beam.scores / (t + 1) ** length_penalty
        candidates = beam._replace(scores=penalized.masked_fill(~beam.ended, -torch.inf))
        best = merge(best, images, candidates)
        beam = beam._replace(scores=beam.scores.masked_fill(beam.ended, -torch.inf))

        # Scores only decrease, so that a prefix can reach at most this. If it cannot enter the
        # n best, the search for its image is over.
        upper_bound = beam.scores.amax(1) / max_len**length_penalty
        active = upper_bound > best.scores[images, -1]  # (A,)
        rows = torch.arange(len(images), device=device).unsqueeze(1) * k + parent  # (A, K)
        images, beam, rows = images[active], beam.of_images(active), rows[active].flatten()
        if not len(images):
            break
        words, state = beam.tokens[:, :, t].flatten(), select(state, rows, dim=1)
        if not active.all() or k != beam.scores.size(1):  # else each prefix keeps its image
            memory = select(memory, rows)
    unfinished = beam._replace(scores=beam.scores / max_len**length_penalty)
    return merge(best, images, unfinished).trimmed()


def extend(beam, log_probs, attention, t, beam_size):
    """Append a word to the prefixes of each image, and keep its `beam_size` best continuations.

    log_probs: (A * K, V) of the next word of each prefix. attention: (A * K, P), or None.
    Returns the new prefixes, and for each the number (A, K') of the one that it continues.
    """
    (images, k), vocab_size = beam.scores.shape, log_probs.size(1)
    log_probs = log_probs.view(images, k * vocab_size)
    total = beam.scores.repeat_interleave(vocab_size, 1) + log_probs  # (A, K * V)
    scores, choice = total.topk(min(beam_size, total.size(1)))  # (A, K')
    parent, word = choice // vocab_size, choice % vocab_size
    beam = beam.take(parent)._replace(scores=scores, ended=word == END)
    beam.tokens[:, :, t] = word
    beam.log_probs[:, :, t] = log_probs.gather(1, choice)
    if attention is not None:
        if beam.attention is None:
            shape = (*beam.tokens.shape, attention.size(1))
            beam = beam._replace(attention=attention.new_zeros(shape))
        attention = attention.view(images, k, -1)
        beam.attention[:, :, t] = attention.take_along_dim(parent.unsqueeze(2), 1)
    return beam, parent


def merge(best, images, candidates):
    """The best captions, after those of `candidates` for the images (A,) have been merged in.

    Captions that have not ended rank below all that have.
    """
    if best.attention is None and candidates.attention is not None:
        shape = (*best.tokens.shape, candidates.attention.size(3))
        best = best._replace(attention=candidates.attention.new_zeros(shape))
    merged = best.of_images(images).cat(candidates)
    rank = merged.scores.double() - 1e9 * ~merged.ended
    merged = merged.take(rank.topk(best.scores.size(1)).indices)
    for field, values in zip(best, merged, strict=True):
        if field is not None:
            field[images] = values
    return best
