"""The precision policy, and that captioning, the loss and feature extraction follow it."""

import pytest
import torch
from conftest import supported, tiny_model

from captioning.base import device as policy
from captioning.base.device import autocast, resolve_precision
from captioning.data.extraction import extract_features
from captioning.learning.losses import TeacherForcing
from captioning.networks.cnn import CNN
from data_loader import Batch
from model import CaptionModel, DecoderRNN

CAPTIONS = torch.tensor([[1, 4, 2], [1, 5, 2]])


@pytest.fixture
def cpu(monkeypatch):
    """A function that sets what the CPU accelerates, and whether its LSTM supports bfloat16; None:
    that is tried again."""

    def set_cpu(capabilities, lstm=None):
        found = dict.fromkeys(capabilities, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        policy._lstm_supports_bfloat16.cache_clear()
        if lstm is not None:
            monkeypatch.setattr(policy, "_lstm_supports_bfloat16", lambda device: lstm)

    return set_cpu


@pytest.mark.parametrize(
    "precision, fast, lstm, expected",
    [
        ("auto", True, True, torch.bfloat16),
        ("auto", True, False, torch.float32),
        ("auto", False, True, torch.float32),
        ("auto", False, False, torch.float32),
        ("float32", True, True, torch.float32),
        ("float32", False, True, torch.float32),
        ("bfloat16", True, True, torch.bfloat16),
        ("bfloat16", False, True, torch.bfloat16),
    ],
)
def test_policy(cpu, precision, fast, lstm, expected):
    """ "auto" is bfloat16 where the CPU accelerates it and the LSTM supports it, else float32; a
    precision that is named is used, whether the CPU accelerates it or not."""
    cpu(["amx_bf16"] if fast else [], lstm)
    with autocast("cpu", precision):
        assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == expected


def test_unknown_precision():
    """An unknown precision is an error that names the choices."""
    with pytest.raises(ValueError, match="'float16'.*auto, float32, bfloat16"):
        resolve_precision("cpu", "float16")


def test_unsupported_bfloat16(cpu, tmp_path):
    """Without a bfloat16 LSTM, bfloat16 is refused in one sentence, also when a model is loaded."""
    cpu(["amx_bf16"], lstm=False)
    path = tmp_path / "best.pt"
    torch.save(tiny_model(precision="bfloat16").checkpoint(), path)
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
def test_any_cpu_that_claims_bfloat16(cpu, capability):
    """Whatever a CPU claims, a training step works; the policy uses no random number."""
    cpu([capability])
    model, state = tiny_model(precision="auto"), torch.get_rng_state()
    resolve_precision("cpu", "auto")
    assert torch.equal(torch.get_rng_state(), state)
    batch = Batch(torch.rand(2, 3, 64, 64), CAPTIONS, None, torch.arange(2))
    TeacherForcing(model)(batch)["loss"].backward()
    assert model.decoder.lstm.weight_hh_l0.grad.isfinite().all()


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_first_call_without_gradients(cpu, no_gradients):
    """The result, which is kept, does not depend on whether the first call has gradients."""
    cpu(["amx_bf16"])
    expected = resolve_precision("cpu", "auto")
    cpu(["amx_bf16"])
    with no_gradients():
        assert resolve_precision("cpu", "auto") == expected
    assert resolve_precision("cpu", "auto") == expected


def generate(model, paths, folder):
    model.generate(model.preprocess(paths))


def loss(model, paths, folder):
    batch = Batch(model.preprocess(paths), CAPTIONS, None, torch.arange(2))
    assert TeacherForcing(model)(batch)["loss"].dtype == torch.float32


def extract(model, paths, folder):
    extract_features(model.encoder.cnn, paths, model.transform, folder, model.config.precision)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "activity, owner, method",
    [(generate, DecoderRNN, "step"), (loss, DecoderRNN, "predict"), (extract, CNN, "views")],
)
def test_one_precision(shared_dataset, tmp_path, monkeypatch, precision, activity, owner, method):
    """Captioning, the loss and feature extraction compute in the precision of the config, which a
    checkpoint keeps and `from_checkpoint` can override."""
    expected, dtypes = getattr(torch, supported(precision)), set()
    paths, original = sorted((shared_dataset / "images").iterdir())[:2], getattr(owner, method)

    def recording(*args):
        result = original(*args)
        dtypes.add(result[0].dtype)
        return result

    for saved_in, override in ((precision, None), ("float32", precision)):
        torch.save(tiny_model(precision=saved_in).checkpoint(), tmp_path / "best.pt")
        model = CaptionModel.from_checkpoint(tmp_path / "best.pt", precision=override)
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, recording)
            activity(model, paths, tmp_path / str(override))
    assert dtypes == {expected}
