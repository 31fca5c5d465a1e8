"""Caption metrics: perplexity, scores against the references, and diagnostics.

perplexity(total_nll, tokens)
scores, per_image = caption_scores(candidates, references)
diagnostics(candidates, training_captions, len(vocab))
"""

import math
from statistics import mean

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning.base.tokens import TOKENIZER, tokenize

# CIDEr-D of n images is on average higher, the smaller n: their own captions are the documents of
# which words are rare. Human captions of Flickr8k score 0.80 with 1,000 images, 0.87 with 100 (one
# standard deviation between draws: 0.06), 0.92 (0.22) with 10.
ENOUGH_IMAGES = 100
# Words that end a caption only if it breaks off: "a man with a". A few are correct ("looks on"):
# of 30,455 human captions of Flickr8k, 0.6 % end in one of these words.
DETERMINERS = "a an the this that his its their"
FUNCTION_WORDS = "and or with without of in on at to for from into is are"
BAD_ENDINGS = {*DETERMINERS.split(), *FUNCTION_WORDS.split()}


def perplexity(total_nll: float, tokens: int) -> float:
    """exp(negative log-likelihood per target token).

    total_nll: in nats, summed over all target tokens. A sum, because a mean of batch means would
        depend on the batch size and on the number of processes.
    tokens: how many these are: every word and `<end>`, but neither `<pad>` nor `<start>`.

    `<unk>` is easy to predict, so report `unk_rate` as well. Raises ValueError if tokens is 0.
    """
    if tokens <= 0:
        raise ValueError("perplexity needs at least one target token")
    return math.exp(min(total_nll / tokens, 700.0))  # exp(710) overflows


def unk_rate(captions, known) -> float:
    """The fraction of the words in `captions` that are not in `known`; `<end>` is not counted."""
    words = [word for caption in captions for word in tokenize(caption)]
    return sum(word not in known for word in words) / max(len(words), 1)


def caption_scores(candidates, references):
    """Score one generated caption per image against all of its references.

    candidates: list of str, one per image. references: for each image, a list of str.
    Both are tokenized by `tokenize`, whose name is part of the result: scores are comparable only
    under the same tokenization.

    BLEU-1..4 (Papineni et al., 2002) and ROUGE-L (Lin, 2004) are between 0 and 1, CIDEr-D (Vedantam
    et al., 2015) between 0 and 10; all are computed by pycocoevalcap, COCO's evaluation code.
    Returns the scores, and a list with the CIDEr-D of each image. If numbers mean less than they
    seem to, "notes" are sentences that say why. CIDEr-D is None for a single image, where it is 0
    by construction. References without a word are left out. Raises ValueError if the lists do not
    match, or if no reference of an image has a word.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions for {len(references)} images: need one per image"
        )
    if not all(references):
        raise ValueError("every image needs at least one reference caption")
    result = {row: [" ".join(tokenize(text))] for row, text in enumerate(candidates)}
    truth = {
        row: [" ".join(words) for text in texts if (words := tokenize(text))]
        for row, texts in enumerate(references)
    }
    for row, texts in truth.items():
        if not texts:
            raise ValueError(f"the references of image {row} have no words: {references[row]}")
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    scores = {f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = float(Rouge().compute_score(truth, result)[0])
    cider, per_image = Cider().compute_score(truth, result)
    scores["CIDEr-D"] = float(cider) if len(candidates) > 1 else None
    scores["tokenizer"] = TOKENIZER
    notes = list(caveats(result, truth))
    return scores | ({"notes": notes} if notes else {}), [float(score) for score in per_image]


def caveats(result, truth):
    """Yields a sentence for each reason why the scores mean less than they seem to."""
    count = len(result)
    if count == 1:
        yield "CIDEr-D of one image is 0 by construction: its words need other images to be rare"
    elif count < ENOUGH_IMAGES:
        yield f"CIDEr-D of {count} images, fewer than {ENOUGH_IMAGES}, is too high and uncertain"
    empty = sum(text == "" for (text,) in result.values())
    if empty:
        yield f"{empty} of {count} captions are empty and score 0"
    if all(len(texts) == 1 for texts in truth.values()):
        yield "one reference per image: the scores are lower than with COCO's five"


def diagnostics(candidates, training_captions, vocab_size) -> dict:
    """How varied the captions are, and how many are copies of training captions.

    distinct: number of different captions, as a fraction of all captions.
    copied from train: the fraction of the captions that are also training captions; left out if
        there are no training captions to compare with.
    bad endings: the fraction of the captions whose last word is one of BAD_ENDINGS.
    vocabulary used: number of different words in the captions, of `vocabulary size`.
    mean length: in words.
    """
    captions = [tuple(tokenize(caption)) for caption in candidates]
    known = {tuple(tokenize(caption)) for caption in training_captions}
    copied = {"copied from train": mean(caption in known for caption in captions)} if known else {}
    return {
        "distinct": len(set(captions)) / len(captions),
        **copied,
        "bad endings": mean(not BAD_ENDINGS.isdisjoint(caption[-1:]) for caption in captions),
        "vocabulary used": len({word for caption in captions for word in caption}),
        "vocabulary size": vocab_size,
        "mean length": mean(map(len, captions)),
    }
