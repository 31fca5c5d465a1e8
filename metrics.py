"""How good are the captions? Perplexity, agreement with human captions, and diagnostics.

perplexity(total_nll, tokens)
scores, per_image = caption_scores(candidates, references, tokenize, TOKENIZER)
diagnostics(candidates, training_captions, vocab.words, tokenize)
"""

import math
import shutil
from statistics import mean

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge


def perplexity(total_nll: float, tokens: int) -> float:
    """exp(total negative log-likelihood in nats / number of real target tokens).

    Real targets are every word and `<end>`; pads and `<start>` are not. Sums go in, not batch
    means, so that neither batch size nor processes change the result. As `<unk>` is easy to guess,
    report its rate beside it. Raises ValueError without tokens.
    """
    if tokens <= 0:
        raise ValueError("perplexity needs at least one real target token")
    return math.exp(min(total_nll / tokens, 700.0))  # above exp(709) a float overflows


def unk_rate(captions, known, tokenize) -> float:
    """The share of the words in `captions` that are not in `known` (`<end>` not counted)."""
    words = [word for caption in captions for word in tokenize(caption)]
    return sum(word not in known for word in words) / max(len(words), 1)


def caption_scores(candidates, references, tokenize, tokenizer_name, java=False):
    """Score one free-running caption per image against all its references.

    candidates: list of strings. references: for each, a list of strings.
    tokenize: string -> words, used on both sides; `tokenizer_name` goes into the result, because
        a score means little without it.
    java: also METEOR and SPICE, which are Java programs (SPICE downloads its models).

    BLEU-1..4 (Papineni et al., 2002), ROUGE-L (Lin, 2004) and CIDEr-D (Vedantam et al., 2015) come
    from pycocoevalcap, COCO's own code. BLEU and ROUGE-L are within 0..1, CIDEr-D within 0..10.
    Returns the scores, and a list with each image's CIDEr-D. Raises ValueError if the two lists
    do not match.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions for {len(references)} images: there must be one each"
        )
    if not all(references):
        raise ValueError("every image needs at least one reference caption")
    result = {row: [" ".join(tokenize(text))] for row, text in enumerate(candidates)}
    truth = {row: [" ".join(tokenize(text)) for text in texts]
             for row, texts in enumerate(references)}  # fmt: skip
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    scores = {f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = float(Rouge().compute_score(truth, result)[0])
    cider, per_image = Cider().compute_score(truth, result)
    scores["CIDEr-D"] = float(cider)
    scores["tokenizer"] = tokenizer_name
    if java:
        scores |= java_scores(truth, result)
    return scores, [float(score) for score in per_image]


def java_scores(truth, result) -> dict:
    """METEOR and SPICE where they can run; where not, None and the reason, never a crash."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice

    scores = {}
    for name, scorer in (("METEOR", Meteor), ("SPICE", Spice)):
        if shutil.which("java") is None:
            scores |= {name: None, f"{name} left out": "there is no java command"}
            continue
        try:
            scores[name] = float(scorer().compute_score(truth, result)[0])
        except Exception as error:  # a foreign process or download: whatever fails, the rest counts
            scores |= {name: None, f"{name} left out": f"{type(error).__name__}: {error}"}
    return scores


def diagnostics(candidates, training_captions, words, tokenize) -> dict:
    """What scores do not show: does the model repeat itself, or its training captions?

    distinct: share of different captions. seen in training: share found there word for word.
    vocabulary used: number of different words, of `words` there are. mean length: in words.
    """
    spoken = [tuple(tokenize(caption)) for caption in candidates]
    seen = {tuple(tokenize(caption)) for caption in training_captions}
    return {
        "distinct": len(set(spoken)) / len(spoken),
        "seen in training": mean(caption in seen for caption in spoken),
        "vocabulary used": len({word for caption in spoken for word in caption}),
        "vocabulary size": len(words),
        "mean length": mean(map(len, spoken)),
    }
