"""The captions of test images, as 3_Inference wrote them, beside the actual ones.

results = load_results("runs/synthetic", test, "synthetic")     # test: CocoCaptions
show_results(results[:4])
"""

import json
from pathlib import Path
from typing import NamedTuple

from pycocoevalcap.rouge.rouge import Rouge

from captioning.base.tokens import tokenize
from captioning.data.images import load_image
from captioning.figures.plots import caption_grid
from captioning.scenes.mistakes import Mistake, find_mistakes, wrong_words
from captioning.scoring.metrics import caption_scores


class Result(NamedTuple):
    """A test image with its captions."""

    path: str
    predicted: str
    actual: str  # the most similar of the actual captions
    cider: float  # the CIDEr-D of the prediction with respect to all of them
    mistakes: list[Mistake]  # of a synthetic scene; of a photograph, nobody has looked for any
    wrong_words: set[int]  # their positions in the prediction


def load_results(run_dir, test, dataset) -> list[Result]:
    """The captions of a run's test images, those with the highest CIDEr-D first.

    test: the `CocoCaptions` of the dataset's test split. dataset: its name; mistakes are known only
    if it is "synthetic".
    """
    written = json.loads(Path(run_dir, "test_captions.json").read_text(encoding="utf-8"))
    caption_of = {result["image_id"]: result["caption"] for result in written}
    predicted = [caption_of[image_id] for image_id in test.image_ids]
    _, cider = caption_scores(predicted, test.captions)
    rows = zip(test.paths, predicted, test.captions, cider, strict=True)
    is_scene, results = dataset == "synthetic", []
    for path, caption, references, score in rows:
        pair = caption, most_similar(caption, references)
        mistakes, wrong = (find_mistakes(*pair), wrong_words(*pair)) if is_scene else ([], set())
        results.append(Result(path, *pair, float(score), mistakes, wrong))
    return sorted(results, key=lambda result: -result.cider)


def most_similar(caption, references):
    """The reference with the highest ROUGE-L."""
    words, *others = (" ".join(tokenize(text)) for text in (caption, *references))
    scores = [Rouge().calc_score([words], [other]) for other in others]
    return references[scores.index(max(scores))]


def show_results(results, columns=4):
    """Images with the predicted caption, its wrong words red, the actual one and the CIDEr-D."""
    if not results:
        print("There are no such images.")
        return None
    notes = []
    for result in results:
        kinds = [f"{mistake.kind}: {mistake.text}" for mistake in result.mistakes]
        notes.append("; ".join([*kinds, f"CIDEr-D {result.cider:.2f}"]))
    return caption_grid(
        [load_image(result.path) for result in results],
        [result.predicted for result in results],
        [result.actual for result in results],
        [bool(result.mistakes) for result in results],
        notes,
        [result.wrong_words for result in results],
        columns,
        width=2.3,
        size=11,
    )
