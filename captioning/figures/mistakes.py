"""Which captions of a dataset are wrong, and pictures that say why.

mistakes = known_mistakes("synthetic", captions, references)    # a list for each caption
compare_captions(image, {"greedy decoding": caption, "actual": reference}, mistakes)
show_results(load_results("runs/synthetic", test, "synthetic")[:4])    # test: CocoCaptions
"""

import json
from pathlib import Path
from typing import NamedTuple

from pycocoevalcap.rouge.rouge import Rouge

from captioning.base.tokens import tokenize
from captioning.data.images import load_image
from captioning.figures.image_text import FADED, RED, Paragraph, pictures
from captioning.figures.plots import BLUE
from captioning.scenes.mistakes import KINDS, Mistake, find_mistakes, wrong_words
from captioning.scoring.metrics import caption_scores


def known_mistakes(dataset, captions, references):
    """The mistakes of each caption of a synthetic scene. references: a correct caption for each.

    Nobody has looked for mistakes in captions of photographs: there, the lists are empty.
    """
    if dataset != "synthetic":
        return [[] for _ in captions]
    return [find_mistakes(*pair) for pair in zip(captions, references, strict=True)]


def share_right(dataset, captions, references):
    """The share of captions without a mistake; NaN for photographs, where it is not known."""
    mistakes = known_mistakes(dataset, captions, references)
    return mistakes.count([]) / len(mistakes) if dataset == "synthetic" else float("nan")


def report_of_right(dataset, captions, references):
    """The entry of report.json with the share of right captions; none for photographs."""
    share = share_right(dataset, captions, references)
    return {"scenes exactly right": share} if dataset == "synthetic" else {}


def in_words(mistakes):
    """For example "missing: yellow mushroom"."""
    return "; ".join(f"{mistake.kind}: {mistake.text}" for mistake in mistakes or [])


def compare_captions(image, captions, mistakes):
    """An image, and beside it captions {name: caption}, each with its mistakes in words.

    mistakes: {name: list of mistakes}; a name without one has no mark.
    """
    block = []
    for name, caption in captions.items():
        found = mistakes.get(name)
        mark = "" if found is None else " ✗" if found else " ✓"
        block += [Paragraph(name + mark, 12, RED if found else BLUE), marked(caption, found, 15)]
        block.append(Paragraph(in_words(found), 12, RED))
    return pictures([image], [block], 1, 3.05, beside=6.0)


def marked(caption, mistakes, size):
    """A caption in bold, whose wrong words are red."""
    return Paragraph(caption, size, weight="bold", red=wrong_words(mistakes or []))


def examples_of_kinds(mistakes, most=2):
    """The positions of captions with few mistakes that show different kinds, `most` at most."""
    chosen, seen = [], set()
    for kind in KINDS:
        rows = [row for row, found in enumerate(mistakes) if kind in {m.kind for m in found}]
        if rows and kind not in seen:
            chosen.append(min(rows, key=lambda row: len(mistakes[row])))
            seen |= {mistake.kind for mistake in mistakes[chosen[-1]]}
    return chosen[:most]


def show_examples(rows, paths, captions, references, mistakes):
    """Images with their predicted and actual captions, and the mistakes in words below them."""
    if not rows:
        print("No mistakes are known.")
        return None
    blocks = [
        [
            marked(captions[row], mistakes[row], 12),
            Paragraph(f"actual: {references[row]}", 10, FADED),
            Paragraph(in_words(mistakes[row]), 10, RED),
        ]
        for row in rows
    ]
    return pictures([load_image(paths[row]) for row in rows], blocks, min(len(rows), 3), 3.0)


# ---------------------------------------------------------------------------- test images


class Result(NamedTuple):
    """A test image with its captions."""

    path: str
    predicted: str
    actual: str  # the most similar of the actual captions
    cider: float  # the CIDEr-D of the prediction with respect to all of them
    mistakes: list[Mistake]  # see `known_mistakes`


def load_results(run_dir, test, dataset) -> list[Result]:
    """The captions of a run's test images, those with the highest CIDEr-D first.

    test: the `CocoCaptions` of the dataset's test split. dataset: its name; mistakes are known only
    if it is "synthetic".
    """
    written = json.loads(Path(run_dir, "test_captions.json").read_text(encoding="utf-8"))
    caption_of = {result["image_id"]: result["caption"] for result in written}
    predicted = [caption_of[image_id] for image_id in test.image_ids]
    _, cider = caption_scores(predicted, test.captions)
    actual = [most_similar(*pair) for pair in zip(predicted, test.captions, strict=True)]
    mistakes = known_mistakes(dataset, predicted, actual)
    rows = zip(test.paths, predicted, actual, map(float, cider), mistakes, strict=True)
    results = [Result(*row) for row in rows]
    return sorted(results, key=lambda result: -result.cider)


def most_similar(caption, references):
    """The reference with the highest ROUGE-L."""
    words, *others = (" ".join(tokenize(text)) for text in (caption, *references))
    scores = [Rouge().calc_score([words], [other]) for other in others]
    return references[scores.index(max(scores))]


def show_results(results):
    """Images with the predicted caption, its wrong words red, the actual one and the CIDEr-D."""
    if not results:
        print("There are no such images.")
        return None
    blocks = [
        [
            marked(result.predicted, result.mistakes, 13),
            Paragraph(result.actual, 11, FADED),
            *[Paragraph(in_words([mistake]), 11, RED) for mistake in result.mistakes],
            Paragraph(f"CIDEr-D {result.cider:.2f}", 11, FADED),
        ]
        for result in results
    ]
    return pictures([load_image(result.path) for result in results], blocks, 4, 2.95)
