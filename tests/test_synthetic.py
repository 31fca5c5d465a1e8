"""The drawn scenes: true captions, COCO's layout, the same bytes everywhere; and their encoder."""

import hashlib
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models import mobilenet_v3_small

import sample_data
from sample_data import describe, draw, random_scene, scene_of, write_sample

SIZES = {"train": 8, "val": 4, "test": 4}
# Of every file of SIZES, from Python 3.10 to 3.13.
DIGEST = "f4af1f179335c1bb6ac1fc9d2d2ff8b65e5303239412a62807a28474e9dd5dff"


@pytest.fixture(scope="module")
def scenes():
    rng = Random("test")
    return [random_scene(rng) for _ in range(1600)]


@pytest.fixture(scope="module")
def captions(scenes):
    rng = Random("test captions")
    return [describe(scene, rng) for scene in scenes]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "sample"
    return root, write_sample(root, SIZES)


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix().encode() for path in files]
    content = b"".join(name + file.read_bytes() for name, file in zip(names, files, strict=True))
    return hashlib.sha256(content).hexdigest()


def pixels_of(scene, thing):
    """Where the picture changes if this thing alone is drawn: a mask (128, 128)."""
    empty = np.asarray(draw(replace(scene, things=())), dtype=int)
    return (np.asarray(draw(replace(scene, things=(thing,))), dtype=int) != empty).any(2)


def test_captions_are_read_back_exactly(scenes, captions):
    """`scene_of` inverts every caption: it finds the background and each pair, and nothing else."""
    for scene, five in zip(scenes, captions, strict=True):
        truth = scene.background, Counter((thing.colour, thing.name) for thing in scene.things)
        assert len(set(five)) == 5
        assert all(scene_of(caption) == truth for caption in five), five


@pytest.mark.parametrize(
    "caption, background, pairs",
    [
        ("a red cat on the beach", "beach", {("red", "cat")}),
        ("A TINY ORANGE KITTEN, BY THE LAKE!", "lake", {("orange", "cat")}),
        ("red red kite kite a blue in the", None, {("red", "kite")}),
        ("a green house in the meadow in the desert", None, {("green", "house")}),
        ("a red , car in the city at <unk>", "city", {("red", "car")}),
        ("a cat of purple", None, set()),
        ("", None, set()),
    ],
)
def test_imperfect_captions_are_read_for_what_they_say(caption, background, pairs):
    """Whatever a model writes has a reading: unknown words say nothing, contradictions neither."""
    assert scene_of(caption) == (background, Counter(pairs))


def test_a_scene_can_have_as_many_things_as_asked_for():
    """Four things, which the dataset never has, are as distinct and apart as one to three are."""
    for number in range(20):
        things = random_scene(Random(number), 4).things
        assert len({(thing.colour, thing.name) for thing in things}) == 4
        assert all(sample_data.relations(a, b) for a, b in combinations(things, 2))


def test_an_object_named_twice_counts_twice():
    """A caption that repeats an object does not say the same as one that names it once."""
    once = scene_of("a red cat and a blue cat on the beach")
    twice = scene_of("a red cat, a blue cat and a red kitten on the beach")
    assert twice == ("beach", {("red", "cat"): 2, ("blue", "cat"): 1})
    assert twice != once and twice[1].keys() == once[1].keys()


def test_stated_relations_hold_in_the_pixels(scenes, captions):
    """If a caption says left, right, above or below, then the drawn pixels lie that way."""
    verb = r"(?: sits| stands| waits| grows| floats| flies| flutters| zooms)? "
    pattern = re.compile(f"(.+?){verb}(to the left of|to the right of|above|over|below|under) (.+)")
    checked = Counter()
    for scene, five in zip(scenes[:80], captions, strict=False):
        if len(scene.things) == 1:
            continue
        spans = {}
        for thing in scene.things:
            rows, cols = np.nonzero(pixels_of(scene, thing))
            spans[thing.colour, thing.name] = rows.min(), rows.max(), cols.min(), cols.max()
        for match in filter(None, map(pattern.match, five)):
            first, relation, rest = match.groups()
            (one,) = scene_of(first)[1]
            for other in scene_of(rest)[1]:
                (top, bottom, left, right), (y0, y1, x0, x1) = spans[one], spans[other]
                holds = {"left": right < x0, "right": left > x1, "above": bottom < y0}
                holds |= {"over": bottom < y0, "below": top > y1, "under": top > y1}
                word = relation.removeprefix("to the ").removesuffix(" of")
                assert holds[word], match.string
                checked[word] += 1
    assert len(checked) == 6 and min(checked.values()) >= 5


def test_things_are_visible_and_do_not_overlap(scenes):
    """Each thing changes enough pixels to be seen, and no pixel belongs to two of them."""
    for scene in scenes[:80]:
        masks = [pixels_of(scene, thing) for thing in scene.things]
        assert all(mask.sum() > 150 for mask in masks)
        assert not any((a & b).any() for a, b in combinations(masks, 2))


def test_captions_are_proper_sentences(captions):
    """Right articles, a capital and a full stop, and six to eighteen words."""
    for caption in sum(captions, []):
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", caption.lower()), caption
        assert caption[0].isupper() and caption.endswith(".") and 6 <= len(caption.split()) <= 18


def test_size_words_are_true(scenes, captions):
    """Only the smallest boxes are called small, only the largest large."""
    pattern = "(small|little|tiny|large|big|huge) ([a-z]+ [a-z]+)"
    words = {28: {"small", "little", "tiny"}, 52: {"large", "big", "huge"}}
    for scene, five in zip(scenes, captions, strict=True):
        sides = {(thing.colour, thing.name): thing.side for thing in scene.things}
        for size, pair in re.findall(pattern, " ".join(five)):
            (named,) = scene_of(pair)[1]
            assert size in words[sides[named]]


def test_words_are_few_and_frequent(captions):
    """8,000 captions use a small vocabulary, and no word of it is rare."""
    counts = Counter(re.findall("[a-z]+", " ".join(sum(captions, [])).lower()))
    assert 60 <= len(counts) <= 110 and min(counts.values()) >= 50


def test_cocos_own_reader_loads_it(sample):
    """pycocotools finds five captions to each image, and the image where the layout says."""
    for split, (image_dir, captions_file) in sample[1].items():
        coco = COCO(captions_file)
        assert len(coco.getImgIds()) == SIZES[split] == len(list(image_dir.iterdir()))
        for image in coco.loadImgs(coco.getImgIds()):
            assert len(coco.getAnnIds(imgIds=image["id"])) == 5
            picture = Image.open(image_dir / image["file_name"])
            assert picture.mode == "RGB" and picture.size == (image["width"], image["height"])
    assert "Drawn scenes" in coco.dataset["info"]["description"]


def test_splits_share_no_picture(tmp_path):
    """No picture of one split is in another, and none is in one twice."""
    write_sample(tmp_path / "sample", {"train": 120, "val": 40, "test": 40})
    assert len({path.read_bytes() for path in tmp_path.rglob("*.jpg")}) == 200


def test_bytes_are_the_same_everywhere(sample, tmp_path):
    """Two writes agree, and agree with the digest recorded on other versions and machines."""
    write_sample(tmp_path / "again", SIZES)
    assert digest(tmp_path / "again") == digest(sample[0]) == DIGEST


def test_seeds_draw_different_scenes(sample, tmp_path):
    """Another seed gives other pictures."""
    write_sample(tmp_path / "other", SIZES, seed=1)
    pictures = {path.read_bytes() for path in sample[0].rglob("*.jpg")}
    assert not pictures & {path.read_bytes() for path in tmp_path.rglob("*.jpg")}


def test_what_is_there_is_not_drawn_again(sample, monkeypatch):
    """A second call returns the same paths without drawing."""
    monkeypatch.setattr(sample_data, "draw", None)
    assert write_sample(sample[0], SIZES) == sample[1]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """If drawing stops halfway, neither the sample nor a temporary folder stays behind."""
    drawn = []

    def stop_at_the_tenth(scene):
        drawn.append(scene)
        if len(drawn) == 10:
            raise KeyboardInterrupt
        return draw(scene)

    monkeypatch.setattr(sample_data, "draw", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "sample", SIZES)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_left_alone(tmp_path):
    """A folder that holds something else is refused and keeps its files."""
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="something else"):
        write_sample(tmp_path, SIZES)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def cut_short(root):
    path = root / "annotations" / "captions_val.json"
    path.write_bytes(path.read_bytes()[:500])


def lose_a_picture(root):
    next((root / "train").iterdir()).unlink()


def lose_a_captions_file(root):
    (root / "annotations" / "captions_train.json").unlink()


def of_an_older_version(root):
    path = root / "annotations" / "captions_test.json"
    path.write_text(path.read_text().replace('"version": "1"', '"version": "0"'))


@pytest.mark.parametrize(
    "damage", [cut_short, lose_a_picture, lose_a_captions_file, of_an_older_version]
)
def test_a_damaged_sample_says_what_to_do(sample, tmp_path, damage):
    """A drawn dataset that is not whole is named as such, left as it is, and can be deleted."""
    root = tmp_path / "sample"
    shutil.copytree(sample[0], root)
    damage(root)
    left = digest(root)
    with pytest.raises(FileExistsError, match="sample holds .* not whole .* delete the folder"):
        write_sample(root, SIZES)
    assert digest(root) == left and list(tmp_path.iterdir()) == [root]
    shutil.rmtree(root)
    write_sample(root, SIZES)
    assert digest(root) == DIGEST


def test_the_stored_encoder_is_a_standard_one():
    """`sample_encoder.pt` is small, finite, and fits torchvision's network key by key."""
    path = Path(sample_data.__file__).with_name("sample_encoder.pt")
    weights = torch.load(path, weights_only=True)
    network = mobilenet_v3_small()
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert unexpected == [] and all(key.startswith("classifier.") for key in missing)
    assert all(value.isfinite().all() for value in weights.values())
    assert path.stat().st_size <= 2_500_000
