"""A model learns the task: captions of held-out synthetic scenes are right."""

from pathlib import Path

import pytest
from conftest import supported

from captioning.learning.options import config_for
from captioning.learning.run import build_run
from captioning.scenes.captions import parse_scene
from captioning.scenes.dataset import write_synthetic
from evaluate import caption_dataset
from train import fit

WEIGHTS = Path(__file__).parent.parent / "synthetic_encoder.pt"


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return write_synthetic(
        tmp_path_factory.mktemp("synthetic") / "data", {"train": 1600, "val": 200}
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_held_out_scenes(splits, tmp_path, precision):
    """At least 80 % of the generated captions name exactly the background and objects of a scene.

    With seeds 0 to 9, 88.5 % to 93.5 % were right in float32, and 89.0 % to 95.0 % in bfloat16.
    """
    supported(precision)
    config = config_for(
        "synthetic",
        splits,
        tmp_path / "out",
        precision=precision,
        weights=str(WEIGHTS),
        cache_dir=str(tmp_path / "cache"),
        device="cpu",
        epochs=4,
        grad_accum_steps=1,
    )
    run = build_run(config)
    fit(run)
    dataset = run.val_loader.dataset
    captions = caption_dataset(run.model, dataset.data, features=dataset.features, beam_size=3)
    scenes = [parse_scene(references[0]) for references in dataset.data.captions]
    right = sum(parse_scene(c) == scene for c, scene in zip(captions, scenes, strict=True))
    assert right >= 0.8 * len(scenes)
