"""CHAIR: how many of the objects that captions name are not in the pictures.

named_objects("a man and two dogs on a sofa")         # ["person", "dog", "couch"]
chair(captions, references, objects_of(image_ids, "annotations/instances_val2017.json"))

Caption Hallucination Assessment with Image Relevance (Rohrbach et al., 2018, arXiv:1809.02156). The
objects are the 80 categories of COCO. An object is in a picture if COCO's instances or one of the
reference captions say so. The word lists in objects.json are this project's own: compare the shares
with each other, not with published ones.
"""

import json
from itertools import takewhile
from pathlib import Path

from captioning.base.tokens import tokenize
from captioning.data.coco import DataError
from captioning.scoring.metrics import BAD_ENDINGS

# "objects": the words that name each category, in the singular. "other phrases" contain such a word
# but name no such object. "plurals" are irregular.
LISTS = json.loads((Path(__file__).parent / "objects.json").read_text())


def plural(phrase: str) -> str:
    *before, noun = phrase.split()
    regular = noun + "s"
    if noun.endswith(("s", "sh", "ch", "x")):
        regular = noun + "es"
    elif noun.endswith("y") and noun[-2] not in "aeou":
        regular = noun[:-1] + "ies"
    return " ".join([*before, LISTS["plurals"].get(noun, regular)])


def _phrases() -> dict[tuple[str, ...], str | None]:
    """{words of a phrase: its category, or None if it names none of the 80}."""
    found = {}
    for category, text in [*LISTS["objects"].items(), (None, LISTS["other phrases"])]:
        for phrase in text.split(", "):
            for form in (phrase, plural(phrase)):
                found[tuple(tokenize(form))] = category
    return found


PHRASES = _phrases()
LONGEST = max(map(len, PHRASES))
ANIMALS = {"bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"}


def named_objects(caption: str) -> list[str]:
    """The categories that a caption names, in order, as often as it names them.

    Of phrases that overlap, the longest one counts: "hot dog" names no dog. A young animal is no
    person: "a baby polar bear" names a bear alone.
    """
    words, found, start = tokenize(caption), [], 0
    while start < len(words):
        lengths = range(min(LONGEST, len(words) - start), 0, -1)
        length = next((n for n in lengths if tuple(words[start : start + n]) in PHRASES), 1)
        category = PHRASES.get(tuple(words[start : start + length]))
        following = takewhile(lambda word: word not in BAD_ENDINGS, words[start + 1 : start + 3])
        is_young_animal = words[start] in ("baby", "adult") and not ANIMALS.isdisjoint(
            PHRASES.get((word,)) for word in following
        )
        if category and not is_young_animal:
            found.append(category)
        start += length
    return found


def objects_of(image_ids, instances_file) -> list[set[str]]:
    """The categories that COCO's instance annotations have for each image.

    Raises DataError for a file of another kind, or without one of the images.
    """
    try:
        content = json.loads(Path(instances_file).read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        found = {image["id"]: set() for image in content["images"]}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].add(names[annotation["category_id"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a file of COCO's instance annotations ({type(error).__name__}: {error})"
        raise DataError(f"{instances_file} {problem}") from error
    missing = [image_id for image_id in image_ids if image_id not in found]
    if missing:
        raise DataError(f"{instances_file} lacks {len(missing)} images, such as {missing[0]}")
    return [found[image_id] for image_id in image_ids]


def chair(captions, references, objects) -> dict:
    """The share of captions, and of the objects that they name, with what is not in the picture.

    captions: one per image. references, objects: for each image, its reference captions and the
    categories that are annotated. "CHAIRi" is 0 if no caption names an object.
    """
    wrong, named, captions_wrong = 0, 0, 0
    for caption, texts, annotated in zip(captions, references, objects, strict=True):
        present = annotated.union(*map(named_objects, texts))
        found = named_objects(caption)
        absent = [category for category in found if category not in present]
        wrong, named = wrong + len(absent), named + len(found)
        captions_wrong += bool(absent)
    return {"CHAIRs": captions_wrong / len(captions), "CHAIRi": wrong / max(named, 1)}
