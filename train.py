"""Train a captioner. One road for the notebook, the command line, a CPU and a GPU.

    python train.py --train-images train2017 --train-captions annotations/captions_train2017.json \
                    --val-images val2017 --val-captions annotations/captions_val2017.json \
                    --out runs/coco
    python train.py ... --out runs/coco --resume       # go on after an interruption

    history = Trainer(Options(train_images=..., out="runs/mine")).fit()    # in a notebook

Into `--out` go best.pt (the epoch with the best validation loss), last.pt (all that a resumption
needs), history.jsonl (one line per epoch) and the same as history.csv, vocabulary.json and
metrics.json.
"""

import hashlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import (
    forget_earlier_run,
    get_rng,
    only_run_in,
    save_atomically,
    set_rng,
    stop_on_sigterm,
    write_atomically,
)
from data_loader import CaptionData, get_loader
from distributed import (
    all_sum,
    barrier,
    exact,
    fast_precision,
    gather,
    is_watched,
    only_deterministic_operations,
    parallel,
    pick_device,
    process_group,
    rank_and_world,
    same_buffers,
    say,
)
from engine import TeacherForcing, evaluate, score
from features import encode_images, find_bad_images, leave_out
from metrics import perplexity
from model import CaptionModel, load_safely, train_transform
from options import Options, parse
from vocabulary import Vocabulary, pack

# What may differ between a run and its resumption; all else would make it another run.
MAY_CHANGE = {
    "epochs", "patience", "save_every", "device", "workers", "cache", "out", "resume", "overwrite",
    "train_images", "train_captions", "val_images", "val_captions",
}  # fmt: skip


class Trainer:
    """A run: `fit()` trains, `report()` scores the captions of the best epoch.

    Creating one reads the data, encodes the images and builds the model. Raises DataError,
    BadImageError, ValueError or OSError, each with a sentence that says what is wrong and what to
    do, before anything is written into `out`. Under torchrun every process creates one, sees its
    share of each batch, and the first of them writes.
    """

    def __init__(self, options: Options):
        self.options, self.out = options, Path(options.out)
        self.device = pick_device(options.device)
        if options.deterministic:
            only_deterministic_operations()
        self.rank, self.world = rank_and_world()
        checkpoint = self.find_earlier_run()
        train_data = CaptionData(options.train_images, options.train_captions)
        val_data = CaptionData(options.val_images, options.val_captions)
        captions = [text for texts in train_data.captions for text in texts]
        self.vocab = Vocabulary.from_counts(
            pack(captions, options.cache).counts(), options.threshold
        )
        torch.manual_seed(options.seed)
        self.model = build_model(options, self.vocab).to(self.device)
        train_features, train_bad = self.look_at(train_data)
        val_features, val_bad = self.look_at(val_data)
        leave_out([train_data, val_data], [train_bad, val_bad], options.skip_bad_images)
        self.train_data, self.val_data = train_data.without(train_bad), val_data.without(val_bad)
        self.train_loader = self.loader(self.train_data, train_features, "train")
        self.val_loader = self.loader(self.val_data, val_features, "val")
        self.network = parallel(TeacherForcing(self.model))
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        updates = options.epochs * -(-len(self.train_loader) // options.accumulate)
        if updates < 200:
            say(
                f"The whole run takes only {updates} steps of the optimizer, hardly enough: "
                "with so few captions try --batch-size 8 --accumulate 1, and more --epochs."
            )
        torch.manual_seed(options.seed + 1000 * self.rank)  # every process its own dropout
        self.history, self.step, self.totals = [], 0, no_totals(self.device)
        if checkpoint:
            self.restore(checkpoint)
        self.kept = len(self.history)  # epochs that are on the disk

    def find_earlier_run(self):
        """The checkpoint to go on from, if that is asked for; else an earlier run is refused."""
        for folder in (self.out, Path(self.options.cache)):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, not a folder; name another")
        last, best = self.out / "last.pt", self.out / "best.pt"
        self.found = self.written()
        if self.options.resume and last.exists():
            return load_safely(last)
        if not self.options.overwrite and (last.exists() or best.exists()):
            if not self.options.resume:
                raise ValueError(
                    f"{self.out} holds an earlier run: go on with --resume, start anew with "
                    "--overwrite, or name another folder with --out"
                )
            # A kill between the two files of the first epoch leaves best.pt alone.
            if len(load_safely(best).get("history", [])) != 1:
                raise ValueError(
                    f"{self.out} holds the best epoch of an earlier run, but no last.pt to go on "
                    "from: start anew with --overwrite, or name another folder with --out"
                )
        if self.options.resume:
            say(f"There is no {last} to go on from yet: this run starts at its beginning.")
        return None

    def look_at(self, data):
        """Every image of a split: (features, {row: why} of the unreadable ones).

        A frozen CNN sees each image once, here; a CNN that is trained too has no lasting features.
        """
        options, model = self.options, self.model
        if options.fine_tune:
            return None, find_bad_images(data.paths, model.transform, options.workers)
        encoded = encode_images(
            model.encoder, data.paths, model.transform, options.cache, workers=options.workers,
            skip_bad=True,
        )  # fmt: skip
        return encoded.rows, encoded.bad

    def loader(self, data, features, mode):
        options, transform = self.options, self.model.transform
        if mode == "train":
            transform = train_transform(options.image_size)
        return get_loader(
            data, self.vocab, transform, features, mode, options.batch_size, options.seed,
            options.workers if features is None else 0, self.rank, self.world, options.cache,
        )  # fmt: skip

    # ------------------------------------------------------------------------ training

    def fit(self) -> list[dict]:
        """Train up to `options.epochs`, or until validation stops improving; return the history.

        Every epoch ends with a checkpoint, and so does every `save_every`-th step: Ctrl-C loses
        only what came after the last. SIGTERM, as Slurm sends it, is answered by saving at once.
        """
        with only_run_in(self.out, self.rank), stop_on_sigterm() as stop:
            if self.rank == 0 and self.found != self.written():
                raise ValueError(
                    f"another run has written into {self.out} since this one looked there; "
                    "start again, or name another folder with --out"
                )
            if not self.history and not self.step and self.rank == 0:
                forget_earlier_run(self.out)  # no file of it may be taken for one of this run
                self.vocab.save(self.out / "vocabulary.json")
            self.write_history()  # it comes after last.pt, so a kill may have left it behind
            try:
                while not self.finished():
                    self.train_epoch(stop)
                    self.history.append(self.validate())
                    must_be_finite(self.history[-1]["val_loss"])
                    self.step, self.totals = 0, no_totals(self.device)
                    self.save()
                    self.kept = len(self.history)
                    say(describe(self.history[-1]))
            except KeyboardInterrupt:
                say(f"\nStopped: {self.kept} epochs are kept. Go on with --resume.")
                raise
        return self.history

    def finished(self) -> bool:
        losses = [line["val_loss"] for line in self.history]
        best = losses.index(min(losses)) if losses else 0
        return len(losses) >= self.options.epochs or len(losses) - best > self.options.patience

    def train_epoch(self, stop):
        """Every training caption once, or, after an interruption, those still missing."""
        options, epoch = self.options, len(self.history)
        self.begun, self.clock = self.step, time.perf_counter()
        self.model.train()
        self.train_loader.batch_sampler.set_epoch(epoch, self.step)
        # Of the random crops that workers make: others in every epoch and process.
        self.train_loader.generator.manual_seed(hash((options.seed, epoch, self.step, self.rank)))
        self.optimizer.zero_grad()  # Ctrl-C may have left some
        steps = len(self.train_loader)
        bar = progress_bar(self.train_loader, f"epoch {epoch + 1}/{options.epochs}", self.step)
        targets = 0
        for images, captions, _ in bar:
            with fast_precision(self.device):
                nll, tokens = self.network(images, captions)
            nll.backward()  # gradients add up until the optimizer's step
            self.totals += exact(torch.stack([nll.detach(), tokens]))
            targets = targets + tokens
            self.step += 1
            if self.step % options.accumulate and self.step < steps:
                continue

            norm = self.update(learning_rate(options, epoch + self.step / steps), targets)
            targets = 0
            if self.step % 20 == 0:  # not at every step: reading a number makes a GPU wait
                bar.set_postfix(loss=f"{(self.totals[0] / self.totals[1]).item():.3f}")
            stopping = self.must_stop(stop)
            if stopping or self.is_time_to_save():
                must_be_finite(norm)
                self.save()
            if stopping:
                say(f"\nTerminated; saved after step {self.step}. Go on with --resume.")
                raise SystemExit(128 + signal.SIGTERM)

    def is_time_to_save(self) -> bool:
        every = self.options.save_every
        return every > 0 and self.step % every < self.options.accumulate

    def update(self, rate, targets):
        """One step of the optimizer, by the mean gradient over the targets of all processes.

        Returns that gradient's norm.
        """
        # DDP has averaged the gradients over the processes, hence `world`.
        scale = self.world / all_sum(targets)
        for weight in self.weights:
            weight.grad.mul_(scale)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.options.clip)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def must_stop(self, stop) -> bool:
        """Has any process been told to end? They ask each other at every tenth update."""
        if self.world == 1:
            return stop.is_set()
        due = self.step % (10 * self.options.accumulate) < self.options.accumulate
        return due and all_sum(self.totals.new_tensor(stop.is_set())).item() > 0

    def validate(self) -> dict:
        """A line of the history: what this epoch's training and the validation after it gave."""
        nll, tokens = all_sum(self.totals).tolist()
        seconds = time.perf_counter() - self.clock
        share = 1 - self.begun / len(self.train_loader)  # below 1 in an epoch that was resumed
        if self.options.fine_tune:
            same_buffers(self.model)
        val_nll, val_tokens = evaluate(self.model, self.val_loader)
        return {
            "epoch": len(self.history) + 1,
            "train_loss": nll / tokens, "train_perplexity": perplexity(nll, tokens),
            "val_loss": val_nll / val_tokens, "val_perplexity": perplexity(val_nll, val_tokens),
            "captions_per_second": round(share * len(self.train_loader.dataset) / seconds, 1),
            "seconds": round(seconds, 1),
        }  # fmt: skip

    # ------------------------------------------------------------------------ files

    def save(self):
        """last.pt with all that a resumption needs; after an epoch the history, and best.pt if due.

        In this order a kill at any moment leaves files that a resumption brings to the same end.
        """
        rng = gather(get_rng(self.device))
        totals = all_sum(self.totals)
        if self.rank > 0:
            return
        losses = [line["val_loss"] for line in self.history]
        checkpoint = {
            "config": self.model.config,
            "model": self.model.state_dict(),
            "options": asdict(self.options),
            "history": self.history,
        }
        if self.step == 0 and losses.index(min(losses)) == len(losses) - 1:
            save_atomically(checkpoint, self.out / "best.pt")
        checkpoint |= {
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "step": self.step,
            "totals": totals,
            "captions": self.captions_seen(),
        }
        save_atomically(checkpoint, self.out / "last.pt")
        self.found = self.written()
        if self.step == 0:
            self.write_history()

    def written(self):
        """When each checkpoint was last written, None for one that is not there."""
        files = (self.out / "last.pt", self.out / "best.pt")
        return [file.stat().st_mtime_ns if file.exists() else None for file in files]

    def write_history(self):
        if self.rank > 0 or not self.history:
            return
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_atomically(lines, self.out / "history.jsonl")
        table = [self.history[0].keys(), *(line.values() for line in self.history)]
        lines = "".join(",".join(map(str, row)) + "\n" for row in table)
        write_atomically(lines, self.out / "history.csv")

    def restore(self, checkpoint):
        """Go on from what `save` kept, exactly; refuse if model, data or recipe are others."""
        try:
            usual = {f.name: f.default for f in fields(Options)}  # of options added since
            before = {**usual, **checkpoint["config"], **checkpoint["options"]}
            changed = [
                f"{name} was {str(before.get(name))[:60]}, is {str(value)[:60]}"
                for name, value in {**self.model.config, **asdict(self.options)}.items()
                if name not in MAY_CHANGE and before.get(name) != value
            ]
            if not self.options.fine_tune and self.cnn_differs(checkpoint["model"]):
                changed.append("the CNN's weights are others")
            if checkpoint["captions"] != self.captions_seen():
                changed.append("the captions or their images are others")
            if changed:
                raise ValueError(f"cannot resume {self.out}: {'; '.join(changed)}")
            if before["epochs"] != self.options.epochs:
                say(
                    f"The learning rate now follows {self.options.epochs} epochs, not "
                    f"{before['epochs']} as before: it differs from a run planned like this."
                )
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.history, self.step = checkpoint["history"], checkpoint["step"]
            if self.rank == 0:
                self.totals += checkpoint["totals"].to(self.totals)
            if len(checkpoint["rng"]) == self.world:
                set_rng(checkpoint["rng"][self.rank], self.device)
            else:
                say("Another number of processes than before: their dropout is drawn anew.")
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{self.out / 'last.pt'} is not a run to go on with ({error}); "
                "start anew with --overwrite"
            ) from None

    def cnn_differs(self, state) -> bool:
        """Has the frozen CNN, whose features are trained on, other weights than in `state`?"""
        return any(
            isinstance(tensor, torch.Tensor) and not torch.equal(tensor.cpu(), state[name].cpu())
            for name, tensor in self.model.state_dict().items()
            if name.startswith("encoder.backbone.")
        )

    def captions_seen(self) -> str:
        """A fingerprint of what is trained and validated on."""
        seen = [(data.image_ids, data.captions) for data in (self.train_data, self.val_data)]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def report(self, beam_size=3) -> dict:
        """Caption the validation images with best.pt, score them; write and return metrics.json."""
        barrier()  # best.pt is complete when the first process gets here
        model = CaptionModel.from_checkpoint(self.out / "best.pt", self.device)
        training = [text for texts in self.train_data.captions for text in texts]
        metrics = {"split": "validation"} | score(model, self.val_loader, training, beam_size)
        if self.rank == 0:
            write_atomically(json.dumps(metrics, indent=2), self.out / "metrics.json")
        return metrics


# ---------------------------------------------------------------------------- parts of a run


def learning_rate(options, epoch: float) -> float:
    """One cycle (Smith & Topin, 2017): linear rise over a tenth of the run, cosine fall to 0."""
    progress = min(epoch / options.epochs, 1.0)
    if progress < 0.1:
        return options.learning_rate * progress / 0.1
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def must_be_finite(number):
    """Nothing is saved over what is good once training has gone wrong."""
    if not math.isfinite(number):
        raise ValueError(
            "the loss is no longer a number: start anew with a lower --learning-rate "
            "(and --overwrite)"
        )


def build_model(options, vocab) -> CaptionModel:
    names = ("backbone", "weights", "fine_tune", "image_size", "mirror", "blind",
             "embed_size", "hidden_size", "num_layers", "dropout", "inject")  # fmt: skip
    return CaptionModel(vocab.words, **{name: getattr(options, name) for name in names})


def no_totals(device):
    """Negative log-likelihood and number of targets so far."""
    return exact(torch.zeros(2, device=device))


def progress_bar(batches, title, done):
    """A bar on standard output, gone when it is full: a notebook keeps no trace of it."""
    return tqdm(batches, title, total=len(batches), initial=done, leave=False, unit="batch",
                file=sys.stdout, mininterval=1, disable=not is_watched())  # fmt: skip


def describe(line) -> str:
    """A line of the history, for people and grep."""
    return (
        f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.3f} "
        f"perplexity {line['train_perplexity']:.2f}  val loss {line['val_loss']:.3f} "
        f"perplexity {line['val_perplexity']:.2f}  {line['captions_per_second']:.0f} captions/s"
    )


# ---------------------------------------------------------------------------- command line


def main(arguments=None) -> int:
    try:
        options = parse(arguments)
        with process_group(pick_device(options.device)):
            trainer = Trainer(options)
            say(
                f"{len(trainer.train_data)} images to train on and {len(trainer.val_data)} to "
                f"validate, {len(trainer.vocab)} words, on {trainer.device}"
            )
            trainer.fit()
            say(json.dumps(trainer.report(), indent=2))
    except (ValueError, OSError) as error:
        text = str(error)
        if text.startswith("Caught "):  # in a worker, whose whole traceback PyTorch puts into it
            text = text.splitlines()[-1]
        print(f"error: {text}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise  # with its traceback: that is a mistake in the program
        print(
            f"error: a process that loads images has died ({str(error).splitlines()[0]}), perhaps "
            "for lack of memory: use fewer --workers; --resume goes on from what was saved",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
