"""The precision policy, and that captioning, the loss and feature extraction follow it."""

import pytest
import torch
from conftest import calibrated_weights, supported

from captioning.base import device
from captioning.base.device import autocast, resolve_precision
from captioning.data.extraction import extract_features
from captioning.learning.losses import TeacherForcing
from captioning.networks.cnn import CNN
from data_loader import Batch
from model import CaptionModel, DecoderRNN, ModelConfig
from vocabulary import Vocabulary

CAPTIONS = torch.tensor([[1, 4, 2], [1, 5, 2]])


def tiny_model(precision):
    config = ModelConfig(
        backbone="mobilenet_v3_small",
        image_size=64,
        embed_size=8,
        hidden_size=8,
        precision=precision,
    )
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat"]
    return CaptionModel(Vocabulary(words), config, calibrated_weights())


@pytest.fixture
def cpu(monkeypatch):
    """A function that sets what the CPU accelerates, and whether its LSTM supports bfloat16."""

    def set_cpu(fast, lstm):
        capabilities = {"amx_bf16": fast, "avx512_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(device, "_lstm_supports_bfloat16", lambda name: lstm)

    return set_cpu


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("lstm", [False, True])
def test_auto(cpu, fast, lstm):
    """ "auto" is bfloat16 where the CPU accelerates it and the LSTM supports it, else float32."""
    cpu(fast, lstm)
    with autocast("cpu", "auto"):
        product = torch.rand(4, 4) @ torch.rand(4, 4)
    assert product.dtype == (torch.bfloat16 if fast and lstm else torch.float32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", [False, True])
def test_explicit_precision(cpu, fast, precision):
    """A precision that is named is used, whether the CPU accelerates it or not."""
    cpu(fast, lstm=True)
    with autocast("cpu", precision):
        product = torch.rand(4, 4) @ torch.rand(4, 4)
    assert product.dtype == getattr(torch, precision)


def test_unknown_precision():
    """An unknown precision is an error that names the choices."""
    with pytest.raises(ValueError, match="'float16'.*auto, float32, bfloat16"):
        resolve_precision("cpu", "float16")


def test_unsupported_bfloat16(cpu, tmp_path):
    """Without a bfloat16 LSTM, bfloat16 is refused in one sentence, also when a model is loaded."""
    cpu(fast=True, lstm=False)
    path = tmp_path / "best.pt"
    torch.save(tiny_model("bfloat16").checkpoint(), path)
    for refused in (
        lambda: resolve_precision("cpu", "bfloat16"),
        lambda: CaptionModel.from_checkpoint(path),
        lambda: CaptionModel.from_checkpoint(path, precision="bfloat16"),
    ):
        with pytest.raises(
            ValueError, match=r"^PyTorch's LSTM .* use --precision float32 \S+ \S+$"
        ):
            refused()
    assert CaptionModel.from_checkpoint(path, precision="float32").config.precision == "float32"


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_any_cpu_that_claims_bfloat16(monkeypatch, capability):
    """Whatever a CPU claims, a training step works; the policy uses no random number."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    device._lstm_supports_bfloat16.cache_clear()
    model, state = tiny_model("auto"), torch.get_rng_state()
    resolve_precision("cpu", "auto")
    assert torch.equal(torch.get_rng_state(), state)
    batch = Batch(torch.rand(2, 3, 64, 64), CAPTIONS, None, None)
    TeacherForcing(model)(batch)["loss"].backward()
    assert model.decoder.lstm.weight_hh_l0.grad.isfinite().all()


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_first_call_without_gradients(monkeypatch, no_gradients):
    """The result, which is kept, does not depend on whether the first call has gradients."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    device._lstm_supports_bfloat16.cache_clear()
    expected = resolve_precision("cpu", "auto")
    device._lstm_supports_bfloat16.cache_clear()
    with no_gradients():
        assert resolve_precision("cpu", "auto") == expected
    assert resolve_precision("cpu", "auto") == expected


def recording(function, dtypes):
    """The function, which also adds the data type of its first result to `dtypes`."""

    def wrapper(*args):
        result = function(*args)
        dtypes.add(result[0].dtype)
        return result

    return wrapper


def generate(model, paths, folder):
    model.generate(torch.stack([model.transform(path) for path in paths]))


def loss(model, paths, folder):
    images = torch.stack([model.transform(path) for path in paths])
    sums = TeacherForcing(model)(Batch(images, CAPTIONS, None, None))
    assert sums["loss"].dtype == torch.float32


def extract(model, paths, folder):
    extract_features(model.encoder.cnn, paths, model.transform, folder, model.config.precision)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "activity, owner, method",
    [(generate, DecoderRNN, "step"), (loss, DecoderRNN, "predict"), (extract, CNN, "views")],
)
def test_one_precision(shared_dataset, tmp_path, monkeypatch, precision, activity, owner, method):
    """Captioning, the loss and feature extraction compute in the precision of the config.

    A checkpoint keeps it, and `from_checkpoint` can override it.
    """
    expected = getattr(torch, supported(precision))
    paths = sorted((shared_dataset / "images").iterdir())[:2]
    for saved_in, override in ((precision, None), ("float32", precision)):
        torch.save(tiny_model(saved_in).checkpoint(), tmp_path / "best.pt")
        model = CaptionModel.from_checkpoint(tmp_path / "best.pt", precision=override)
        dtypes = set()
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, recording(getattr(owner, method), dtypes))
            activity(model, paths, tmp_path / str(override))
        assert dtypes == {expected}
