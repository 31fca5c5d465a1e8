"""Which captions of a dataset are wrong, and pictures that say why.

mistakes = known_mistakes("synthetic", captions, references)    # a list for each caption
compare_captions(image, {"greedy decoding": caption, "actual": reference}, reference)
"""

from textwrap import wrap

from captioning.data.images import load_image
from captioning.figures.inference import image_beside
from captioning.figures.plots import BLUE, RED, caption_grid
from captioning.scenes.mistakes import KINDS, find_mistakes


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


def compare_captions(image, captions, mistakes, size=15):
    """An image, and beside it captions {name: caption}, each with its mistakes in words.

    mistakes: {name: list of mistakes}; a name without one has no mark. size: of the font.
    """
    lines = []  # (text, style, height in inches)
    for name, caption in captions.items():
        found = mistakes.get(name)
        mark = "" if found is None else " ✗" if found else " ✓"
        lines.append((name + mark, {"size": 12, "color": RED if found else BLUE}, 0.25))
        lines += [
            (line, {"size": size, "weight": "bold"}, 0.02 * size)
            for line in wrap(caption, 690 // size)
        ]
        lines += [(line, {"size": 12, "color": RED}, 0.26) for line in wrap(in_words(found), 60)]
        lines.append(("", {}, 0.12))
    height = max(3.05, sum(line[2] for line in lines))
    ax = image_beside(image, 6.0, height)
    y = height
    for text, style, space in lines:
        ax.text(0, y, text, va="top", **style)
        y -= space
    ax.set(xlim=(0, 6.0), ylim=(0, height))
    ax.set_axis_off()
    return ax


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
    return caption_grid(
        [load_image(paths[row]) for row in rows],
        [captions[row] for row in rows],
        [f"actual: {references[row]}" for row in rows],
        [True] * len(rows),
        [in_words(mistakes[row]) for row in rows],
        [{t for mistake in mistakes[row] for t in mistake.words} for row in rows],
        columns=2,
        width=3.2,
        size=12,
    )
