"""The training loop.

history = fit(run)      # run: a `Run`, for example from train.build_run
"""

import math
import signal
import sys
import time

import torch
from tqdm import tqdm

from captioning.base.device import to_float64, usual_defaults
from captioning.base.distributed import (
    all_reduce_sum,
    broadcast_buffers,
    print0,
    rank_and_world_size,
    show_progress,
    wrap_ddp,
)
from captioning.learning.optimizer import optimizer_step, schedule
from captioning.learning.run import Run
from captioning.learning.run_files import (
    best_epoch,
    find_earlier_run,
    lock_run_dir,
    prepare_run_dir,
    restore,
    save_run,
    stop_on_sigterm,
)
from captioning.scoring.evaluation import caption_split, check_cider, evaluate_loss, score
from captioning.scoring.metrics import perplexity


@usual_defaults()
def fit(run: Run, after_epoch=None) -> list[dict]:
    """Train up to `config.epochs`, or until validation stops improving; returns the history.

    Raises ValueError if config.out contains an earlier run, unless it is to be resumed or replaced.

    after_epoch: called with the run after each epoch, for example to caption an image.

    Saves a checkpoint after every epoch and every `save_every` batches; Ctrl-C loses the progress
    since the last one. SIGTERM, which Slurm sends before it kills a job, saves one at once.
    """
    config, progress, saved = run.config, run.progress, 0
    lock, run.lock = run.lock or lock_run_dir(config.out), None
    try:
        with lock, stop_on_sigterm() as stop:
            if not progress.history and not progress.step:
                earlier = find_earlier_run(config)  # a Run made by hand has not looked for one
                if earlier:
                    restore(run, earlier)
            if config.best_by == "cider":
                check_cider(run.val_images.data)
            # Waits for all ranks: none looks any more for the files that `prepare_run_dir` deletes.
            loss = wrap_ddp(run.loss, find_unused_parameters=config.fine_tune != "none")
            prepare_run_dir(run)
            saved = progress.epoch
            if config.init_from and not progress.history:  # the model that this run starts from
                end_epoch(run, {"epoch": 0})
            while not is_finished(progress, config):
                train_one_epoch(run, loss, lambda norm: save_if_due(run, norm, stop))
                end_epoch(run, training_results(run))
                saved = progress.epoch
                if after_epoch:
                    after_epoch(run)
            if progress.epoch < config.epochs:
                print0(f"Stopped: no better validation for {config.patience} epochs.")
    except KeyboardInterrupt:
        print0(f"\nInterrupted after {saved} complete epochs. Continue with --resume.")
        raise
    return progress.history


# ---------------------------------------------------------------------------- one epoch


def train_one_epoch(run: Run, loss, after_update):
    """Train on every caption once; after an interruption, on the remaining ones of the epoch.

    Calls `after_update(gradient_norm)` after each optimizer step.
    """
    config, progress, loader = run.config, run.progress, run.train_loader
    epoch, steps = progress.epoch, len(loader)
    loss.train()
    loader.batch_sampler.set_epoch(epoch, progress.step)
    # This seeds the random crops in the worker processes.
    loader.generator.manual_seed(hash((config.seed, epoch, progress.step, rank_and_world_size())))
    run.optimizer.zero_grad()
    targets, start = 0, time.perf_counter() - progress.seconds
    bar = tqdm(
        loader,
        f"epoch {epoch + 1}/{config.epochs}",
        initial=progress.step,
        total=steps,
        unit="batch",
        leave=False,
        file=sys.stdout,
        mininterval=1,
        disable=not show_progress(),
    )
    for batch in bar:
        sums = loss(batch)
        sums["loss"].backward()  # gradients are summed over the batches of an update
        for name, value in sums.items():
            progress.totals[name] = progress.totals.get(name, 0) + to_float64(value.detach())
        targets = targets + sums["targets"]
        progress.step += 1
        if progress.step % config.batches_per_update and progress.step < steps:
            continue
        done = (epoch + progress.step / steps) / config.epochs
        factor = schedule(done, config.schedule)
        norm = optimizer_step(run.optimizer, targets, factor, config.grad_clip)
        progress.seconds = time.perf_counter() - start
        targets = 0
        if progress.step % 20 == 0:  # not in every step, because item() synchronizes a GPU
            bar.set_postfix({k: f"{v:.3f}" for k, v in training_means(progress.totals).items()})
        after_update(norm)


# ---------------------------------------------------------------------------- after an epoch


def training_means(totals) -> dict:
    """The mean loss per target, and its perplexity or the mean reward of the sampled captions.

    totals: sums of what the loss returned.
    """
    sums = {name: float(value) for name, value in totals.items()}
    means = {"train_loss": sums["loss"] / sums["targets"]}
    if "reward" in sums:
        return means | {"train_reward": sums["reward"] / sums["samples"]}
    return means | {"train_perplexity": perplexity(sums["loss"], sums["targets"])}


def training_results(run: Run) -> dict:
    """The training results of an epoch, for its line of the history."""
    progress, captions = run.progress, len(run.train_loader.dataset)
    totals = {name: all_reduce_sum(value) for name, value in progress.totals.items()}
    return {
        "epoch": progress.epoch + 1,
        **training_means(totals),
        "captions_per_second": round(captions / max(progress.seconds, 1e-3), 1),
        "seconds": round(progress.seconds, 1),
    }


def end_epoch(run: Run, training: dict):
    """Validate, add a line to the history, save and print it; training: the training results."""
    progress = run.progress
    progress.history.append(training | validate(run))
    check_finite(progress.history[-1]["val_loss"])
    progress.step, progress.totals, progress.seconds = 0, {}, 0.0
    save_run(run)
    print0(describe_epoch(progress.history[-1]))


def validate(run: Run) -> dict:
    """The validation results of the model, for a line of the history."""
    # The statistics of BatchNorm that training updates, on each rank from its own batches.
    encoder = run.model.encoder
    broadcast_buffers(encoder if run.config.fine_tune == "all" else encoder.norm)
    nll, targets = evaluate_loss(run.model, run.val_loader)
    results = {"val_loss": nll / targets, "val_perplexity": perplexity(nll, targets)}
    if run.config.best_by == "cider":
        captions = caption_split(run.model, run.val_images)
        metrics = score(captions, run.val_images.data, run.model.vocab)
        results |= {
            "val_cider": metrics["CIDEr-D"],
            "val_distinct": metrics["distinct"],
            "val_bad_endings": metrics["bad endings"],
        }
    return results


def describe_epoch(line) -> str:
    """A line of the history as text; epoch 0 has no training results."""
    parts = {
        "epoch": "epoch {:3d}",
        "train_loss": "train loss {:.3f}",
        "train_perplexity": "perplexity {:.2f}",
        "train_reward": "reward {:.3f}",
        "val_loss": "val loss {:.3f}",
        "val_perplexity": "perplexity {:.2f}",
        "val_cider": "CIDEr-D {:.3f}",
        "val_distinct": "distinct {:.1%}",
        "val_bad_endings": "bad endings {:.1%}",
        "captions_per_second": "{:.0f} captions/s",
    }
    return "  ".join(text.format(line[name]) for name, text in parts.items() if name in line)


# ---------------------------------------------------------------------------- stopping


def is_finished(progress, config) -> bool:
    history = progress.history
    stalled = history and len(history) - 1 - best_epoch(history, config.best_by) >= config.patience
    return progress.epoch >= config.epochs or bool(stalled)


def save_if_due(run: Run, norm, stop):
    """Save if a save is due by `save_every`, or after SIGTERM; then raise SystemExit."""
    config, step = run.config, run.progress.step
    stopping = must_stop(run, stop)
    due = config.save_every > 0 and step % config.save_every < config.batches_per_update
    if stopping or due:
        check_finite(norm)
        save_run(run)
    if stopping:
        print0(f"\nTerminated, saved after batch {step}. Continue with --resume.")
        raise SystemExit(128 + signal.SIGTERM)


def must_stop(run: Run, stop) -> bool:
    """Whether any rank has received SIGTERM. Ranks synchronize every tenth update."""
    if rank_and_world_size()[1] == 1:
        return stop.is_set()
    every = run.config.batches_per_update
    due = run.progress.step % (10 * every) < every
    return due and all_reduce_sum(torch.tensor(float(stop.is_set()))).item() > 0


def check_finite(value):
    """Raise ValueError for NaN or infinity, before a diverged model replaces a good checkpoint."""
    if not math.isfinite(value):
        raise ValueError(
            "the loss is not finite: start again with a lower --learning-rate (and --overwrite)"
        )
