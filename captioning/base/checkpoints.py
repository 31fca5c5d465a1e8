"""Saving and loading checkpoints: tensors and plain values, never code.

save({"model": model.state_dict(), ...}, "runs/x/last.pt")     # atomic
checkpoint = load_safely("runs/x/last.pt")                     # runs no code from the file
export("runs/x/best.pt", "captioner.pt")                       # weights only, half precision
"""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from captioning.base.files import atomic_write
from captioning.base.tokens import TOKENIZER

FORMAT = 3  # of checkpoints of a model; increase it when older ones cannot be loaded any more
CONTENT = {"config": dict, "words": list, "threshold": int, "model": dict, "card": dict}


def save(checkpoint: dict, path):
    """torch.save as an atomic write. Raises OSError if the file cannot be written."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_safely(path):
    """torch.load for untrusted files: tensors and plain values only, never code.

    Raises FileNotFoundError, or ValueError for a damaged file or one with other content.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the checksums that it writes
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        with warnings.catch_warnings():  # raised by torch.load itself for quantized tensors
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains more than tensors and plain values, or is not a PyTorch file; "
            "it was not loaded, and no code in it was run"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise ValueError(f"{path} is damaged or not a PyTorch file ({error})") from error


def load_checkpoint(path) -> dict:
    """The checkpoint of a captioning model. Raises what `load_safely` raises, or ValueError."""
    checkpoint = load_safely(path)
    if not isinstance(checkpoint, dict) or "config" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a captioning model, such as best.pt")
    if checkpoint.get("format") != FORMAT or not checkpoint.keys() >= CONTENT.keys():
        raise ValueError(
            f"{path} is a checkpoint of another version of this project: load it with that "
            "version, or train the model again"
        )
    for name, kind in CONTENT.items():
        if not isinstance(checkpoint[name], kind):
            raise ValueError(f"{path} is damaged: its {name} is not a {kind.__name__}")
    if checkpoint.get("tokenizer", TOKENIZER) != TOKENIZER:
        raise ValueError(
            f"{path} was trained on captions of another tokenizer ({checkpoint['tokenizer']}), not "
            f"of this version's ({TOKENIZER}): load it with its own version, or train it again"
        )
    if not isinstance(checkpoint["card"].get("summary"), str):
        raise ValueError(f"{path} is damaged: its card has no summary")
    return checkpoint


def export(source, target, card=None):
    """Write the weights of a checkpoint in half precision, without the optimizer state.

    card: entries to add to the model card, or to replace in it.

    The file is smaller, and `CaptionModel.from_checkpoint` loads it. Vectors, such as biases and
    BatchNorm statistics, stay in float32: they are small, and may exceed the range of half
    precision. Raises what `load_checkpoint` raises, or OSError.
    """
    checkpoint = load_checkpoint(source)
    halves = {}

    def halved(value):
        if isinstance(value, dict):
            return {name: halved(content) for name, content in value.items()}
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.dim() > 1:
            return halves.setdefault(value.data_ptr(), value.half())  # tied weights once
        return value

    kept = {name: checkpoint[name] for name in ("format", *CONTENT)}
    kept |= {name: halved(checkpoint.get(name)) for name in ("model", "detector")}
    kept |= {"confidence": checkpoint.get("confidence"), "tokenizer": TOKENIZER}
    kept |= {"card": checkpoint["card"] | (card or {})}
    save(kept | {"history": checkpoint.get("history", [])}, target)
