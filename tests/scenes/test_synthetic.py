"""The synthetic scenes: correct captions, COCO's layout, reproducible files; and their encoder."""

import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models import mobilenet_v3_small

from captioning.scenes import synthetic
from captioning.scenes.synthetic import (
    is_wrong,
    make_captions,
    parse_scene,
    random_scene,
    render,
    write_synthetic,
)

SIZES = {"train": 8, "val": 4, "test": 4}
# SHA-256 over the names and contents of all files of SIZES.
DIGEST = "c568415bf542ac76d95b395f5b395cbf9726610db6da481dca6b2fcd4f94e2e4"


@pytest.fixture(scope="module")
def scenes():
    rng = Random("test")
    return [random_scene(rng) for _ in range(1600)]


@pytest.fixture(scope="module")
def captions(scenes):
    rng = Random("test captions")
    return [make_captions(scene, rng) for scene in scenes]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "synthetic"
    return root, write_synthetic(root, SIZES)


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix().encode() for path in files]
    content = b"".join(name + file.read_bytes() for name, file in zip(names, files, strict=True))
    return hashlib.sha256(content).hexdigest()


def pixels_of(scene, thing):
    """The pixels that change if this thing is added to the background: a mask (128, 128)."""
    empty = np.asarray(render(replace(scene, things=())), dtype=int)
    return (np.asarray(render(replace(scene, things=(thing,))), dtype=int) != empty).any(2)


def test_captions_are_read_back_exactly(scenes, captions):
    """`parse_scene` finds the background and all pairs of every caption, and nothing else."""
    for scene, five in zip(scenes, captions, strict=True):
        truth = scene.background, Counter((thing.colour, thing.name) for thing in scene.things)
        assert len(set(five)) == 5
        assert all(parse_scene(caption) == truth for caption in five), five


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
def test_any_caption_can_be_parsed(caption, background, pairs):
    """Case, punctuation and unknown words are ignored, and so are contradicting backgrounds."""
    assert parse_scene(caption) == (background, Counter(pairs))


def test_a_scene_with_a_given_number_of_things():
    """Four things, more than in the dataset, are distinct and do not overlap either."""
    for number in range(20):
        things = random_scene(Random(number), 4).things
        assert len({(thing.colour, thing.name) for thing in things}) == 4
        assert all(synthetic.relations(a, b) for a, b in combinations(things, 2))


def test_an_object_named_twice_counts_twice():
    """A caption that repeats an object differs from one that names it once."""
    once = parse_scene("a red cat and a blue cat on the beach")
    twice = parse_scene("a red cat, a blue cat and a red kitten on the beach")
    assert twice == ("beach", {("red", "cat"): 2, ("blue", "cat"): 1})
    assert twice != once and twice[1].keys() == once[1].keys()


def test_wrong_captions(scenes, captions):
    """A caption is right with respect to those of its own scene, and wrong for all others."""
    for (scene, five), (other, others) in pairwise(zip(scenes, captions, strict=True)):
        assert not is_wrong(five[0], five[1])
        facts = [(s.background, {(t.colour, t.name) for t in s.things}) for s in (scene, other)]
        assert is_wrong(five[0], others[0]) == (facts[0] != facts[1])


def test_stated_relations_hold_in_the_pixels(scenes, captions):
    """Left, right, above and below in a caption are true of the pixels of the objects."""
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
            (one,) = parse_scene(first)[1]
            for other in parse_scene(rest)[1]:
                (top, bottom, left, right), (y0, y1, x0, x1) = spans[one], spans[other]
                holds = {"left": right < x0, "right": left > x1, "above": bottom < y0}
                holds |= {"over": bottom < y0, "below": top > y1, "under": top > y1}
                word = relation.removeprefix("to the ").removesuffix(" of")
                assert holds[word], match.string
                checked[word] += 1
    assert len(checked) == 6 and min(checked.values()) >= 5


def test_things_are_visible_and_do_not_overlap(scenes):
    """Each thing changes more than 150 pixels, and no pixel belongs to two things."""
    for scene in scenes[:80]:
        masks = [pixels_of(scene, thing) for thing in scene.things]
        assert all(mask.sum() > 150 for mask in masks)
        assert not any((a & b).any() for a, b in combinations(masks, 2))


def test_captions_are_proper_sentences(captions):
    """Correct articles, a capital and a full stop, and six to eighteen words."""
    for caption in sum(captions, []):
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", caption.lower()), caption
        assert caption[0].isupper() and caption.endswith(".") and 6 <= len(caption.split()) <= 18


def test_size_words_are_true(scenes, captions):
    """Only things in the smallest boxes are called small, only those in the largest large."""
    pattern = "(small|little|tiny|large|big|huge) ([a-z]+ [a-z]+)"
    words = {28: {"small", "little", "tiny"}, 52: {"large", "big", "huge"}}
    for scene, five in zip(scenes, captions, strict=True):
        sides = {(thing.colour, thing.name): thing.side for thing in scene.things}
        for size, pair in re.findall(pattern, " ".join(five)):
            (named,) = parse_scene(pair)[1]
            assert size in words[sides[named]]


def test_words_are_few_and_frequent(captions):
    """8,000 captions use 60 to 110 words, each at least 50 times."""
    counts = Counter(re.findall("[a-z]+", " ".join(sum(captions, [])).lower()))
    assert 60 <= len(counts) <= 110 and min(counts.values()) >= 50


def test_cocos_own_reader_loads_it(dataset):
    """pycocotools finds every image of a split with five captions."""
    for split, (image_dir, captions_file) in dataset[1].items():
        coco = COCO(captions_file)
        assert len(coco.getImgIds()) == SIZES[split] == len(list(image_dir.iterdir()))
        for image in coco.loadImgs(coco.getImgIds()):
            assert len(coco.getAnnIds(imgIds=image["id"])) == 5
            picture = Image.open(image_dir / image["file_name"])
            assert picture.mode == "RGB" and picture.size == (image["width"], image["height"])
    assert "Synthetic scenes" in coco.dataset["info"]["description"]


def test_splits_share_no_image(tmp_path):
    """All images of all splits are different."""
    write_synthetic(tmp_path / "synthetic", {"train": 120, "val": 40, "test": 40})
    assert len({path.read_bytes() for path in tmp_path.rglob("*.jpg")}) == 200


def test_bytes_are_the_same_everywhere(dataset, tmp_path):
    """Writing twice gives the same files, with the digest recorded on other machines."""
    write_synthetic(tmp_path / "again", SIZES)
    assert digest(tmp_path / "again") == digest(dataset[0]) == DIGEST


def test_seeds_give_different_scenes(dataset, tmp_path):
    """Another seed gives other images."""
    write_synthetic(tmp_path / "other", SIZES, seed=1)
    pictures = {path.read_bytes() for path in dataset[0].rglob("*.jpg")}
    assert not pictures & {path.read_bytes() for path in tmp_path.rglob("*.jpg")}


def test_an_existing_dataset_is_reused(dataset, monkeypatch):
    """A second call returns the same paths without rendering."""
    monkeypatch.setattr(synthetic, "render", None)
    assert write_synthetic(dataset[0], SIZES) == dataset[1]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """An interrupt leaves neither an incomplete dataset nor a temporary folder."""
    rendered = []

    def stop_at_the_tenth(scene):
        rendered.append(scene)
        if len(rendered) == 10:
            raise KeyboardInterrupt
        return render(scene)

    monkeypatch.setattr(synthetic, "render", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "synthetic", SIZES)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_left_alone(tmp_path):
    """A folder with other files is an error, and keeps them."""
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="other files"):
        write_synthetic(tmp_path, SIZES)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def truncate_captions(root):
    path = root / "annotations" / "captions_val.json"
    path.write_bytes(path.read_bytes()[:500])


def remove_an_image(root):
    next((root / "train").iterdir()).unlink()


def remove_captions(root):
    (root / "annotations" / "captions_train.json").unlink()


def lower_the_version(root):
    path = root / "annotations" / "captions_test.json"
    path.write_text(path.read_text().replace('"version": "2"', '"version": "1"'))


@pytest.mark.parametrize(
    "damage", [truncate_captions, remove_an_image, remove_captions, lower_the_version]
)
def test_a_damaged_dataset_is_an_error(dataset, tmp_path, damage):
    """It is kept, the message names the remedy, and after that the dataset can be written."""
    root = tmp_path / "synthetic"
    shutil.copytree(dataset[0], root)
    damage(root)
    before = digest(root)
    with pytest.raises(FileExistsError, match="synthetic holds .* incomplete .* delete the folder"):
        write_synthetic(root, SIZES)
    assert digest(root) == before != DIGEST and list(tmp_path.iterdir()) == [root]
    shutil.rmtree(root)
    write_synthetic(root, SIZES)
    assert digest(root) == DIGEST


def test_the_stored_encoder_is_a_standard_one():
    """`synthetic_encoder.pt` is small, finite, and has the keys of torchvision's network."""
    path = Path(synthetic.__file__).with_name("synthetic_encoder.pt")
    weights = torch.load(path, weights_only=True)
    network = mobilenet_v3_small()
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert unexpected == [] and all(key.startswith("classifier.") for key in missing)
    assert all(value.isfinite().all() for value in weights.values())
    assert path.stat().st_size <= 2_500_000


def test_generated_scenes_are_those_written(tmp_path):
    """`generate_scenes` gives the scene behind each image of a written dataset."""
    sizes = {"train": 3, "test": 2}
    files = synthetic.write_synthetic(tmp_path / "data", sizes)
    for split, number, scene, captions in synthetic.generate_scenes(sizes):
        images, annotations = files[split]
        found = [
            a["caption"]
            for a in json.loads(annotations.read_text())["annotations"]
            if a["image_id"] == number
        ]
        image = np.asarray(Image.open(images / f"{number:012d}.jpg"), dtype=int)
        assert found == captions
        assert np.abs(image - np.asarray(synthetic.render(scene), dtype=int)).mean() < 5


@pytest.mark.parametrize("shape", [(3, 3), (4, 8)])
def test_attention_on_things(shape):
    """The share of the attention in a box equals that of the map enlarged to the image's pixels;
    uniform attention gives chance, and a noun that names nothing in the scene is left out."""
    thing = synthetic.Thing("red", "cat", 20, 70, 37, False)
    scene = synthetic.Scene("beach", 0, (thing,))
    weights = np.random.default_rng(0).dirichlet(np.ones(shape[0] * shape[1]), 6)
    weights = weights.reshape(6, *shape)
    weights[4] = 1 / weights[0].size
    found = synthetic.attention_on_things("a red cat a red kitten", weights, scene)
    side = 3 * 128  # divisible by 3, 4 and 8
    for (share, chance), t in zip(found, (2, 5), strict=True):
        pixels = np.repeat(np.repeat(weights[t], side // shape[0], 0), side // shape[1], 1)
        pixels = pixels / pixels.sum()
        assert share == pytest.approx(pixels[3 * 70 : 3 * 107, 3 * 20 : 3 * 57].sum())
        assert chance == pytest.approx((37 / 128) ** 2)
    assert synthetic.box_share(weights[4], thing) == pytest.approx((37 / 128) ** 2)
    assert synthetic.attention_on_things("a blue cat", weights, scene) == []
