"""A training run and its progress.

train.build_run builds a run from files of captions. With loaders of your own:

config = TrainConfig(out="runs/mine", epochs=5)
run = Run(config, model, TeacherForcing(model), build_optimizer(model, config), train_loader,
          val_loader)
history = fit(run)

Of such a config, `fit` uses what describes the training: epochs, schedule, seed, grad_accum_steps
(see `TrainConfig.captions_per_batch`), grad_clip, patience, best_by, save_every, resume, overwrite,
init_from (the history begins with epoch 0, the model before training) and fine_tune.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from captioning.base.device import resolve_precision
from captioning.learning.train_config import TrainConfig


@dataclass
class Progress:
    """How far a run has got: the completed epochs, and the batches of the current one."""

    history: list = field(default_factory=list)  # a dict of results per epoch
    step: int = 0  # batches of the current epoch
    totals: dict = field(default_factory=dict)  # sums of what the loss returned for these batches
    seconds: float = 0.0  # duration of their training

    @property
    def epoch(self) -> int:
        """The number of completed epochs. The history may begin with epoch 0, before training."""
        return self.history[-1]["epoch"] if self.history else 0


@dataclass
class Run:
    """What `fit` trains, and with what."""

    config: TrainConfig
    model: torch.nn.Module  # a `CaptionModel`
    loss: torch.nn.Module  # batch -> dict of sums, see losses.py
    optimizer: torch.optim.Optimizer  # each of its groups has a "max_lr"
    train_loader: torch.utils.data.DataLoader  # of `data_loader.get_loader`
    val_loader: torch.utils.data.DataLoader
    val_images: Any = None  # an `ImageDataset` to caption after each epoch, for best_by "cider"
    data_digest: str = ""  # of the captions, to resume with the same ones
    lock: Any = None  # of config.out: a context manager, which `fit` leaves at its end
    progress: Progress = field(default_factory=Progress)

    @property
    def precision(self) -> str:
        """The precision that the run computes in: "float32" or "bfloat16"."""
        return resolve_precision(self.model.device, self.config.precision)
