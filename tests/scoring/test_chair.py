"""CHAIR, the share of named objects that are not in the picture; hand-made cases."""

import json

import pytest

from captioning.data.coco import DataError
from captioning.scoring.chair import LISTS, chair, named_objects, objects_of

CASES = {
    "A man and two dogs on a sofa.": ["person", "dog", "couch"],
    "a hot dog and a bear": ["hot dog", "bear"],
    "a teddy bear on a bed": ["teddy bear", "bed"],
    "two glasses of wine": ["wine glass"],
    "a glass of wine": ["wine glass"],
    "a baby elephant with a baby": ["elephant", "person"],
    "a baby polar bear with a baby and dog": ["bear", "person", "dog"],
    "an orange cat beside oranges": ["cat", "orange"],
    "three sheep, geese, knives and children": ["sheep", "bird", "knife", "person"],
    "a train station and train tracks": [],
    "women riding buses and horses": ["person", "bus", "horse"],
    "a red double-decker bus": ["bus"],
    "the sky": [],
}


@pytest.mark.parametrize("caption, expected", CASES.items())
def test_named_objects(caption, expected):
    """Plurals, synonyms and phrases name a category; parts of longer phrases do not."""
    assert named_objects(caption) == expected


def test_there_are_80_categories():
    """The 80 categories of COCO, each of which its own name names."""
    assert len(LISTS["objects"]) == 80
    assert [name for name in LISTS["objects"] if named_objects(name) != [name]] == ["orange"]


def test_chair():
    """An object counts as present if it is annotated or in a reference."""
    captions = ["a dog and a cat", "a man", "the sky", "two cows and a cow"]
    references = [["a kitten"], ["people"], ["a plane"], ["a horse"]]
    objects = [set(), {"car"}, set(), {"sheep"}]
    assert chair(captions, references, objects) == {"CHAIRs": 2 / 4, "CHAIRi": 3 / 5}


def test_objects_of_images(tmp_path):
    """The categories of each image, in the order of the ids; a missing image is an error."""
    content = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 2, "category_id": n} for n in (17, 18, 17)],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    assert objects_of([2, 1], file) == [{"cat", "dog"}, set()]
    with pytest.raises(DataError, match="lacks 1 images, such as 3"):
        objects_of([1, 3], file)
    file.write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match="instance annotations"):
        objects_of([1], file)
