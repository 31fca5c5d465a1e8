"""Train a captioning model: on a CPU, a GPU, or several processes; from a notebook or a shell.

    python train.py --train-images train2017 --train-captions annotations/captions_train2017.json \
                    --val-images val2017 --val-captions annotations/captions_val2017.json \
                    --out runs/coco
    python train.py ... --out runs/coco --resume       # continue after an interruption

    run = build_run(TrainConfig(train_images=..., out="runs/mine"))    # in a notebook
    history = fit(run)

Written to `--out`: best.pt (the best epoch on validation), last.pt (everything needed to resume),
history.jsonl (one line per epoch; history.csv has the same), vocabulary.json and metrics.json.
"""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from captioning.base.distributed import (
    all_reduce_sum,
    barrier,
    broadcast_buffers,
    pick_device,
    print0,
    process_group,
    rank_and_world_size,
    show_progress,
    to_float64,
)
from captioning.base.files import write_text
from captioning.learning.checkpoint import (
    best_epoch,
    lock_run_dir,
    prepare_run_dir,
    save_run,
    stop_on_sigterm,
)
from captioning.learning.options import parse_args
from captioning.learning.run import Run, build_run
from captioning.scoring.metrics import perplexity
from evaluate import evaluate_captions, evaluate_loss, score_captions
from model import CaptionModel

# ---------------------------------------------------------------------------- one epoch


def train_one_epoch(run: Run, after_update):
    """Train on every caption once; after an interruption, on the remaining ones of the epoch.

    Calls `after_update(gradient_norm)` after each optimizer step.
    """
    config, progress, loader = run.config, run.progress, run.train_loader
    epoch, steps = progress.epoch, len(loader)
    run.loss.train()
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
        loss, tokens, *rewards = run.loss(*batch)
        loss.backward()  # gradients are summed over the batches of an update
        progress.totals += to_float64(torch.stack([loss.detach(), tokens, *rewards]))
        targets = targets + tokens
        progress.step += 1
        if progress.step % config.batches_per_update and progress.step < steps:
            continue
        done = (epoch + progress.step / steps) / config.epochs
        norm = update(run, targets, schedule(done, config.schedule))
        progress.seconds = time.perf_counter() - start
        targets = 0
        if progress.step % 20 == 0:  # not in every step, because item() synchronizes a GPU
            bar.set_postfix({k: f"{v:.3f}" for k, v in training_means(progress.totals).items()})
        after_update(norm)


def update(run: Run, targets, factor):
    """An optimizer step with the mean gradient over the targets of all ranks; returns its norm.

    targets: their number on this rank. factor: of the maximum learning rate of each group.
    """
    _, world_size = rank_and_world_size()
    scale = world_size / all_reduce_sum(targets)  # DDP has averaged the gradients over the ranks
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad.mul_(scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.grad_clip)
    for group in run.optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def schedule(progress: float, shape="one-cycle") -> float:
    """One cycle (Smith & Topin, 2017): linear increase over a tenth of the run, cosine decay to 0.

    progress: 0 at the start of the run, 1 at its end. shape: "constant" returns 1 instead.
    Returns a factor between 0 and 1.
    """
    if shape == "constant":
        return 1.0
    progress = min(progress, 1.0)
    if progress < 0.1:
        return progress / 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def training_means(totals) -> dict:
    """The mean loss per target, and its perplexity or the mean reward of the sampled captions.

    totals: sums of what the loss returned, see `TeacherForcing` and `SelfCritical`.
    """
    loss, tokens, *rewards = totals.tolist()
    if not rewards:
        return {"train_loss": loss / tokens, "train_perplexity": perplexity(loss, tokens)}
    reward, samples = rewards
    return {"train_loss": loss / tokens, "train_reward": reward / samples}


def training_results(run: Run) -> dict:
    """The training results of an epoch, for its line of the history."""
    progress, captions = run.progress, len(run.train_loader.dataset)
    seconds = max(progress.seconds, 1e-3)  # an old checkpoint at the end of an epoch has none
    return {
        "epoch": progress.epoch + 1,
        **training_means(all_reduce_sum(progress.totals)),
        "captions_per_second": round(captions / seconds, 1),
        "seconds": round(seconds, 1),
    }


def end_epoch(run: Run, training: dict):
    """Validate, add a line to the history, save and print it; training: the training results."""
    progress = run.progress
    progress.history.append(training | validate(run))
    check_finite(progress.history[-1]["val_loss"])
    progress.step, progress.totals = 0, torch.zeros_like(progress.totals)
    progress.seconds = 0.0
    save_run(run)
    print0(describe_epoch(progress.history[-1]))


def validate(run: Run) -> dict:
    """The validation results of the model, for a line of the history."""
    # The statistics of BatchNorm that training updates, on each rank from its own batches.
    encoder = run.model.encoder
    broadcast_buffers(encoder if run.config.fine_tune == "all" else encoder.norm)
    nll, tokens = evaluate_loss(run.model, run.val_loader)
    results = {"val_loss": nll / tokens, "val_perplexity": perplexity(nll, tokens)}
    if run.config.best_by == "cider":
        metrics = score_captions(run.model, run.val_loader)
        results |= {
            "val_cider": metrics["CIDEr-D"],
            "val_distinct": metrics["distinct"],
            "val_bad_endings": metrics["bad endings"],
        }
    return results


# ---------------------------------------------------------------------------- the run


def fit(run: Run, after_epoch=None) -> list[dict]:
    """Train up to `config.epochs`, or until validation stops improving; returns the history.

    after_epoch: called with the run after each epoch, for example to caption an image.

    Saves a checkpoint after every epoch and every `save_every` batches; Ctrl-C loses the progress
    since the last one. SIGTERM, which Slurm sends before it kills a job, saves one at once.
    """
    config, progress = run.config, run.progress
    rank, _ = rank_and_world_size()
    saved = progress.epoch
    with lock_run_dir(Path(config.out), rank), stop_on_sigterm() as stop:
        prepare_run_dir(run)
        try:
            if config.init_from and not progress.history:  # the model that this run starts from
                end_epoch(run, {"epoch": 0, **signature_of(run.reward)})
            while not is_finished(progress, config):
                train_one_epoch(run, lambda norm: save_if_due(run, norm, stop))
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


def signature_of(reward) -> dict:
    """{"reward": what it is} of self-critical training, else nothing."""
    return {"reward": reward.signature} if reward else {}


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
    return due and all_reduce_sum(run.progress.totals.new_tensor(stop.is_set())).item() > 0


def check_finite(value):
    """Raise ValueError for NaN or infinity, before a diverged model replaces a good checkpoint."""
    if not math.isfinite(value):
        raise ValueError(
            "the loss is not finite: start again with a lower --learning-rate (and --overwrite)"
        )


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


def report(run: Run, beam_size=3) -> dict:
    """Evaluate best.pt on the validation images; returns the metrics and writes metrics.json."""
    barrier()  # best.pt is complete when rank 0 gets here
    best = Path(run.config.out) / "best.pt"
    model = CaptionModel.from_checkpoint(best, run.model.device)
    captions = run.train_loader.dataset.data.all_captions
    metrics = {"split": "validation", "precision": run.precision}
    metrics |= signature_of(run.reward)
    metrics |= evaluate_captions(model, run.val_loader, captions, beam_size)
    if rank_and_world_size()[0] == 0:
        write_text(Path(run.config.out) / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


# ---------------------------------------------------------------------------- command line


def error_message(error) -> str | None:
    """The message for an error caused by the user or the machine; None for a bug."""
    text = str(error)
    if isinstance(error, RuntimeError):
        if "DataLoader worker (pid" not in text:
            return None
        return (
            f"a data-loader worker ended unexpectedly ({text.splitlines()[0]}), perhaps for lack "
            "of memory: use fewer --num-workers; --resume continues from what was saved"
        )
    # PyTorch prepends the traceback to an exception that was raised in a worker.
    return text.splitlines()[-1] if text.startswith("Caught ") else text


def main(arguments=None) -> int:
    try:
        config = parse_args(arguments)
        with process_group(pick_device(config.device)):
            run = build_run(config)
            print0(
                f"{len(run.train_loader.dataset.data)} training and "
                f"{len(run.val_loader.dataset.data)} validation images, {len(run.model.vocab)} "
                f"words, {run.precision} on {run.model.device}"
            )
            fit(run)
            print0(json.dumps(report(run), indent=2))
    except (ValueError, OSError, RuntimeError) as error:
        message = error_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
