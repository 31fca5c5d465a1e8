"""Everything runs on a GPU as far as the device of each tensor goes, tested without a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import WORDS, tiny_config, tiny_model
from pretended_device import pretend_cuda

from captioning.data.extraction import extract_features
from captioning.decoding.confidence import Confidence
from captioning.decoding.ensemble import Ensemble
from captioning.learning.loop import fit
from captioning.learning.losses import SelfCritical, TeacherForcing
from captioning.learning.optimizer import optimizer_step
from captioning.learning.reward import CiderD
from captioning.networks.word_detector import WordDetector
from captioning.scenes.generation import write_synthetic
from captioning.scoring.evaluation import evaluate_loss
from data_loader import Batch
from train import build_run

CAPTIONS = torch.tensor([[1, 4, 5, 8, 7, 2], [1, 6, 2, 0, 0, 0], [1, 4, 6, 3, 2, 0]])
BATCH = Batch(torch.rand(2, 3, 64, 64), CAPTIONS, None, torch.tensor([0, 0, 1]))


@pytest.fixture(params=["par", "pre", "init", "attend"])
def model(request):
    with pretend_cuda():
        torch.manual_seed(0)
        model = tiny_model(inject=request.param, fine_tune="all", image_norm=True)
        if request.param == "attend":
            x, shares = torch.rand(9, model.encoder.cnn.feature_size), torch.rand(9, len(WORDS))
            model.detector = WordDetector.fit(x, shares, (x[:3], x[0, :3]), [(4, 0)])
            model.confidence = Confidence(torch.ones(5), torch.zeros(()))
        yield model.to("cuda")


@pytest.fixture
def photos(shared_dataset):
    return sorted((shared_dataset / "images").iterdir())[:3]


@pytest.mark.parametrize("reinforced", [False, True], ids=["cross-entropy", "self-critical"])
def test_training_step(model, reinforced):
    """An optimizer step, with a batch as a loader returns it: on the CPU."""
    if reinforced:
        model.decoder.dropout.p = 0.0
        reward = CiderD([CAPTIONS[:2].tolist(), CAPTIONS[2:].tolist()])
        loss = SelfCritical(model, reward, samples=3, xe_weight=0.5)
    else:
        loss = TeacherForcing(model, label_smoothing=0.1)
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "max_lr": 0.01}], fused=True)
    before = model.decoder.linear.weight.clone()
    sums = loss(BATCH)
    sums["loss"].backward()
    optimizer_step(optimizer, sums["targets"], factor=1.0, grad_clip=1.0)
    assert not torch.equal(model.decoder.linear.weight, before)
    assert {x.device.type for x in (*sums.values(), before)} == {"cuda"}


def test_validation(model):
    """The loss of a split, and of an ensemble: the same as on the CPU."""
    on_gpu = evaluate_loss(model, [BATCH, BATCH])
    both = BATCH._replace(images=(BATCH.images, BATCH.images))
    assert evaluate_loss(Ensemble([model, model]), [both, both]) == pytest.approx(on_gpu)
    assert evaluate_loss(model.cpu(), [BATCH, BATCH]) == pytest.approx(on_gpu)


@pytest.mark.parametrize("members", [1, 2])
def test_captions(model, photos, members):
    """Beam search, sampling and attention, of one model and of an ensemble, as on the CPU."""
    captioner = Ensemble([model] * members) if members > 1 else model
    attends = {"return_attention": model.config.inject == "attend"}
    sampling = {"temperature": 1.0, "generator": torch.Generator("cuda")}
    captioner.caption(photos, **sampling, **attends)
    captioner.caption(photos, beam_size=4, **attends)
    on_gpu = captioner.caption(photos, n_best=2)
    model.cpu()
    assert captioner.caption(photos, n_best=2) == on_gpu


@pytest.mark.parametrize("model", ["attend"], indirect=True)
def test_extraction(model, photos, tmp_path):
    """The features of a CNN on the GPU are those of one on the CPU."""
    features = []
    for device in ("cuda", "cpu"):
        cnn = model.encoder.cnn.to(device).eval()
        array = extract_features(cnn, photos, model.transform, tmp_path / device, "float32")
        features.append(array[[0, 1, 2]])
    assert (features[0] == features[1]).all()


@pytest.mark.parametrize("changes", [{}, {"inject": "attend", "fine_tune": "last"}], ids=str)
def test_run(dataset, changes):
    """A run with validation and captions after each epoch, and its continuation."""
    with pretend_cuda():
        for resume in (False, True):
            config = tiny_config(dataset, device="cuda", best_by="cider", **changes)
            run = build_run(replace(config, epochs=1 + resume, resume=resume))
            assert run.model.device.type == "cuda"
            assert len(fit(run)) == 1 + resume


@pytest.mark.parametrize("model", ["par"], indirect=True)
@pytest.mark.parametrize(
    "mixed",
    [
        lambda model, x: model(BATCH.images, x),
        lambda model, x: model.encoder(BATCH.images),
        lambda model, x: model.decoder(model.encode(BATCH.images), CAPTIONS),
        lambda model, x: model.generate(BATCH.images, temperature=1.0, generator=torch.Generator()),
        lambda model, x: torch.stack([x.sum(), CAPTIONS.sum()]),
        lambda model, x: torch.zeros(()).add_(x.sum()),
        lambda model, x: CAPTIONS[x[0]],
        lambda model, x: x.cpu() + x,
    ],
)
def test_mixed_devices(model, mixed):
    """What would fail on a GPU fails here: tensors of the CPU and of the GPU in one operation."""
    with pytest.raises(RuntimeError, match="same device, not cpu and cuda:0"):
        mixed(model, CAPTIONS.to("cuda"))


def test_array_of_another_device():
    """Tensors on the GPU are no numpy arrays, and copies change no tensor of the CPU."""
    with pretend_cuda():
        for convert in (torch.Tensor.numpy, torch.Tensor.__array__):
            with pytest.raises(TypeError, match="cpu"):
                convert(torch.zeros(2, device="cuda"))
        numbers = torch.zeros(2)
        for copy in (numbers.to("cuda"), numbers.cuda(), torch.as_tensor(numbers, device="cuda")):
            copy += 1
            assert copy.device.type == "cuda" and copy.cpu().tolist() == [1, 1]
        assert numbers.device.type == "cpu" and numbers.tolist() == [0, 0]


def test_training_notebook(tmp_path, monkeypatch):
    """The cells of 2_Training, with models on the GPU, a smaller model and 12 scenes."""
    matplotlib.use("Agg")
    monkeypatch.chdir(Path(__file__).parents[1])
    write_synthetic(tmp_path / "data", {"train": 12, "val": 4, "test": 4})
    options = {"device": "cuda", "epochs": 1, "hidden_size": 16, "cache_dir": f"{tmp_path}/cache"}
    parameters = {"DATA_DIR": tmp_path / "data", "RUN_DIR": f"{tmp_path}/run", "OPTIONS": options}
    namespace = {}
    with pretend_cuda():
        for cell in json.loads(Path("2_Training.ipynb").read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), namespace)
                namespace |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}
        runs = (namespace[name] for name in ("run", "attend_run", "critical_run"))
        assert {run.model.device.type for run in runs} == {"cuda"}
