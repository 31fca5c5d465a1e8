"""The dataset of scenes: COCO's layout, reproducible files, complete or an error; its encoder."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models import mobilenet_v3_small

from captioning.scenes import generation as module
from captioning.scenes.drawing import render
from captioning.scenes.generation import generate_scenes, write_synthetic

SIZES = {"train": 8, "val": 4, "test": 4}
# SHA-256 over the names and contents of all files of SIZES.
DIGEST = "0f613f0d96b0b916295f3afff27f4ecf2d220d1ba3c7549463de58ea184b996e"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "synthetic"
    return root, write_synthetic(root, SIZES)


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix().encode() for path in files]
    content = b"".join(name + file.read_bytes() for name, file in zip(names, files, strict=True))
    return hashlib.sha256(content).hexdigest()


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


def test_bytes_are_the_same_everywhere(dataset, tmp_path):
    """Writing twice gives the same files, with the digest recorded on other machines."""
    write_synthetic(tmp_path / "again", SIZES)
    assert digest(tmp_path / "again") == digest(dataset[0]) == DIGEST


def test_all_images_are_different():
    """No two images of the splits, or of two seeds, are equal."""
    sizes = {"train": 120, "val": 40, "test": 40}
    scenes = [scene for seed in (0, 1) for _, _, scene, _ in generate_scenes(sizes, seed)]
    assert len({render(scene).tobytes() for scene in scenes}) == len(scenes) == 400


def test_generated_scenes_are_those_written(dataset):
    """`generate_scenes` gives the scene behind each image of a written dataset."""
    for split, number, scene, captions in generate_scenes(SIZES):
        images, annotations = dataset[1][split]
        written = json.loads(annotations.read_text())["annotations"]
        assert [a["caption"] for a in written if a["image_id"] == number] == captions
        image = np.asarray(Image.open(images / f"{number:012d}.jpg"), dtype=int)
        assert np.abs(image - np.asarray(render(scene), dtype=int)).mean() < 5


def test_an_existing_dataset_is_reused(dataset, monkeypatch):
    """A second call returns the same paths without rendering."""
    monkeypatch.setattr(module, "render", None)
    assert write_synthetic(dataset[0], SIZES) == dataset[1]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """An interrupt leaves neither an incomplete dataset nor a temporary folder."""
    rendered = []

    def stop_at_the_tenth(scene):
        rendered.append(scene)
        if len(rendered) == 10:
            raise KeyboardInterrupt
        return render(scene)

    monkeypatch.setattr(module, "render", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "synthetic", SIZES)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_left_alone(tmp_path):
    """A folder with other files is an error, and keeps them."""
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="other files"):
        write_synthetic(tmp_path, SIZES)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize(
    "name, damage",
    [
        ("annotations/captions_val.json", lambda content: content[:500]),
        ("annotations/captions_train.json", None),
        ("annotations/captions_test.json", lambda content: content.replace(b': "3"', b': "2"')),
        ("train/000000000003.jpg", None),
    ],
    ids=["truncated captions", "no captions", "a lower version", "an image is missing"],
)
def test_a_damaged_dataset_is_an_error(dataset, tmp_path, name, damage):
    """It is kept, the message names the remedy, and after that the dataset can be written."""
    root = tmp_path / "synthetic"
    shutil.copytree(dataset[0], root)
    content = (root / name).read_bytes()
    (root / name).unlink()
    if damage:
        (root / name).write_bytes(damage(content))
    before = digest(root)
    with pytest.raises(FileExistsError, match="synthetic holds .* incomplete .* delete the folder"):
        write_synthetic(root, SIZES)
    assert digest(root) == before != DIGEST and list(tmp_path.iterdir()) == [root]
    shutil.rmtree(root)
    write_synthetic(root, SIZES)
    assert digest(root) == DIGEST


@pytest.mark.parametrize("name", ["encoder.pt", "map_encoder.pt"])
def test_the_stored_encoders_are_standard_ones(name):
    """The files are small, finite, and have the keys of torchvision's network."""
    path = Path(module.__file__).with_name(name)
    weights = torch.load(path, weights_only=True)
    missing, unexpected = mobilenet_v3_small().load_state_dict(weights, strict=False)
    assert unexpected == [] and all(key.startswith("classifier.") for key in missing)
    assert all(value.isfinite().all() for value in weights.values())
    assert path.stat().st_size <= 2_500_000
