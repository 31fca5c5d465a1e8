"""Train a captioner. One road for the notebook, the command line, a CPU and a GPU.

    python train.py --train-images train2017 --train-captions annotations/captions_train2017.json \
                    --val-images val2017 --val-captions annotations/captions_val2017.json \
                    --out runs/coco
    python train.py ... --out runs/coco --resume       # go on after an interruption

    history = train(Options(train_images=..., out="runs/mine"))     # the same, in a notebook

Into `--out` go best.pt (the epoch with the best validation loss), last.pt (all that a resumption
needs), history.jsonl (one line per epoch), vocabulary.json and metrics.json.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data_loader import CaptionData, get_loader
from features import encode_images, fast_precision, find_bad_images
from metrics import caption_scores, diagnostics, perplexity, unk_rate
from model import PAD, BadImageError, CaptionModel, load_safely, train_transform
from vocabulary import TOKENIZER, Vocabulary, tokenize


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """Everything a run depends on; the command line's flags are these fields."""

    train_images: str = option(MISSING, "folder of the training images")
    train_captions: str = option(MISSING, "their captions, a JSON in COCO's format")
    val_images: str = option(MISSING, "folder of the validation images")
    val_captions: str = option(MISSING, "their captions")
    out: str = option(MISSING, "folder for checkpoints, history and metrics")
    # the model
    backbone: str = option("resnet50", "any torchvision classification network")
    weights: str | None = option("DEFAULT", "torchvision's name, a state dict's path, or none")
    fine_tune: bool = option(False, "train the CNN too: slow, nothing can be cached")
    image_size: int = option(224, "side of the square the CNN sees, in pixels")
    embed_size: int = option(512, "size of word and image embeddings")
    hidden_size: int = option(512, "size of the LSTM's state")
    num_layers: int = option(1, "LSTM layers")
    dropout: float = option(0.5, "on the LSTM's inputs and outputs")
    inject: str = option("pre", "how the image enters the LSTM: pre, par or init")
    blind: bool = option(False, "show black images only: the no-image baseline")
    threshold: int = option(5, "a word must occur this often in training to be in the vocabulary")
    # the training
    epochs: int = option(15, "passes over all training captions")
    batch_size: int = option(128, "captions per step")
    learning_rate: float = option(2e-3, "peak of a one-cycle schedule (AdamW)")
    weight_decay: float = option(0.01, "AdamW's decay")
    clip: float = option(5.0, "largest norm of the gradient")
    patience: int = option(4, "stop after so many epochs without a better validation loss")
    seed: int = option(0, "of initialisation, order and dropout")
    # the machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = option(0, "processes that load images")
    cache: str = option("runs/cache", "folder for the frozen CNN's features")
    skip_bad_images: bool = option(False, "leave out images that cannot be read, and name them")
    overwrite: bool = option(False, "start anew in a folder that holds an earlier run")
    resume: bool = option(False, "go on from last.pt in --out")


# What may differ between a run and its resumption; all else would make it another run.
MAY_CHANGE = {
    "epochs", "patience", "device", "workers", "cache", "out", "resume", "overwrite",
    "train_images", "train_captions", "val_images", "val_captions",
}  # fmt: skip


class Trainer:
    """A run: `fit()` trains, `report()` scores the captions of the best epoch.

    Creating one reads the data, encodes the images and builds the model. Raises DataError,
    BadImageError, ValueError or OSError, each with a sentence that says what is wrong and what to
    do, before anything is written into `out`.
    """

    def __init__(self, options: Options):
        self.options, self.out = options, Path(options.out)
        self.device = pick_device(options.device)
        last = self.find_earlier_run()
        self.train_data = load_split(options.train_images, options.train_captions)
        self.val_data = load_split(options.val_images, options.val_captions)
        captions = [text for texts in self.train_data.captions for text in texts]
        self.vocab = Vocabulary.build(captions, options.threshold)
        torch.manual_seed(options.seed)
        self.model = build_model(options, self.vocab).to(self.device)
        self.train_data, self.train_loader = self.load(self.train_data, "train")
        self.val_data, self.val_loader = self.load(self.val_data, "val")
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            weights, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.history = []
        if last:
            self.restore(last)

    def find_earlier_run(self):
        """The checkpoint to go on from, if that is asked for; an earlier run is never lost."""
        path = self.out / "last.pt"
        if self.options.resume:
            return load_safely(path, self.device)
        if path.exists() and not self.options.overwrite:
            raise ValueError(
                f"{self.out} holds an earlier run: go on with --resume, start anew with "
                "--overwrite, or name another folder with --out"
            )
        return None

    def load(self, data, mode):
        """A split without its unreadable images, and its batches.

        A frozen CNN's features are computed once and are what the batches hold.
        """
        options, encoder = self.options, self.model.encoder
        transform, features = self.model.transform, None
        if options.fine_tune:
            bad = find_bad_images(data.paths, transform, options.workers)
            transform = train_transform(options.image_size) if mode == "train" else transform
        else:
            encoded = encode_images(
                encoder, data.paths, transform, options.cache, workers=options.workers
            )
            bad, features = encoded.bad, encoded.rows
        if bad:
            announce(bad, data, skip=options.skip_bad_images)
            data = data.without(bad)
        loader = get_loader(
            data, self.vocab, transform, features, mode, options.batch_size, options.seed,
            options.workers if options.fine_tune else 0,
        )  # fmt: skip
        return data, loader

    def fit(self) -> list[dict]:
        """Train up to `options.epochs`, or until validation stops improving; return the history.

        Every epoch ends with its checkpoint, so Ctrl-C loses no more than the epoch under way.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.vocab.save(self.out / "vocabulary.json")
        try:
            while not self.finished():
                self.history.append(self.run_epoch(len(self.history)))
                print(summary(self.history[-1]), flush=True)
                self.save()
        except KeyboardInterrupt:
            print(f"\nStopped; {len(self.history)} whole epochs are kept. Go on with --resume.")
            raise
        return self.history

    def finished(self) -> bool:
        losses = [line["val_loss"] for line in self.history]
        best = losses.index(min(losses)) if losses else 0
        return len(losses) >= self.options.epochs or len(losses) - best > self.options.patience

    def run_epoch(self, epoch) -> dict:
        """One pass over all training captions, then validation; returns the line of the history."""
        options, model = self.options, self.model.train()
        steps = len(self.train_loader)
        self.train_loader.batch_sampler.set_epoch(epoch)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # nats, target tokens
        start, captions_seen = time.perf_counter(), 0
        bar = progress_bar(self.train_loader, f"epoch {epoch + 1}/{options.epochs}")
        for step, (images, captions, _) in enumerate(bar):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(options, (epoch * steps + step) / steps)
            with fast_precision(self.device):
                nll, tokens = caption_nll(model, images, captions, options.blind)
            (nll / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += torch.stack([nll.detach().double(), nll.new_tensor(tokens).double()])
            captions_seen += len(captions)
            if step % 20 == 0 and not bar.disable:  # reading the loss makes a GPU wait
                bar.set_postfix(loss=f"{nll.item() / tokens:.3f}")
        seconds = time.perf_counter() - start
        train_loss = (total[0] / total[1]).item()
        val_nll, val_tokens = evaluate(self.model, self.val_loader, options.blind)
        return {
            "epoch": epoch + 1,
            "train_loss": train_loss, "train_perplexity": perplexity(train_loss, 1),
            "val_loss": val_nll / val_tokens, "val_perplexity": perplexity(val_nll, val_tokens),
            "captions_per_second": round(captions_seen / seconds, 1), "seconds": round(seconds, 1),
        }  # fmt: skip

    def save(self):
        """best.pt if this epoch is the best, last.pt always, then the history."""
        checkpoint = {
            "config": self.model.config,
            "model": self.model.state_dict(),
            "options": asdict(self.options),
            "history": self.history,
        }
        losses = [line["val_loss"] for line in self.history]
        if losses[-1] == min(losses):
            save_atomically(checkpoint, self.out / "best.pt")
        checkpoint |= {
            "optimizer": self.optimizer.state_dict(),
            "rng": get_rng(self.device),
            "captions": self.captions_seen(),
        }
        save_atomically(checkpoint, self.out / "last.pt")
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_atomically(lines, self.out / "history.jsonl")

    def restore(self, checkpoint):
        """Go on from what `save` kept, exactly; refuse if model, data or recipe are others."""
        try:
            before = {**checkpoint["config"], **checkpoint["options"]}
            changed = [
                f"{name} was {str(before.get(name))[:60]}, is {str(value)[:60]}"
                for name, value in {**self.model.config, **asdict(self.options)}.items()
                if name not in MAY_CHANGE and before.get(name) != value
            ]
            if checkpoint["captions"] != self.captions_seen():
                changed.append("the captions are others")
            if not changed:
                self.model.load_state_dict(checkpoint["model"])
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                self.history = checkpoint["history"]
                set_rng(checkpoint["rng"], self.device)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{self.out / 'last.pt'} is not a run to go on with ({error}); "
                "start anew with --overwrite"
            ) from None
        if changed:
            raise ValueError(f"cannot resume {self.out}: {'; '.join(changed)}")

    def captions_seen(self) -> str:
        """A fingerprint of what is trained and validated on."""
        seen = [(data.image_ids, data.captions) for data in (self.train_data, self.val_data)]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def report(self, beam_size=3) -> dict:
        """Caption the validation images with best.pt, score them; write and return metrics."""
        model = CaptionModel.from_checkpoint(self.out / "best.pt", self.device)
        dataset = self.val_loader.dataset
        loader = get_loader(
            self.val_data, transform=dataset.transform, features=dataset.features, mode="test"
        )
        candidates = caption_split(model, loader, beam_size)
        references = self.val_data.captions
        scores, _ = caption_scores(candidates, references, tokenize, TOKENIZER)
        training = [text for texts in self.train_data.captions for text in texts]
        nll, tokens = evaluate(model, self.val_loader, self.options.blind)
        metrics = {
            "split": "validation", "images": len(self.val_data), "beam_size": beam_size,
            "val_perplexity": perplexity(nll, tokens),
            "unk_rate": unk_rate([text for texts in references for text in texts],
                                 self.vocab.index, tokenize),
            **scores, **diagnostics(candidates, training, self.vocab.words, tokenize),
        }  # fmt: skip
        write_atomically(json.dumps(metrics, indent=2), self.out / "metrics.json")
        return metrics


# ---------------------------------------------------------------------------- the steps of a run


def caption_nll(model, images, captions, blind=False):
    """Teacher forcing: the negative log-likelihood of a batch, summed, and its number of targets.

    images: (B, 3, H, W), or pooled features (B, feature_size). captions: (B, T), on the CPU.
    The last layer and the loss see real targets only, every word and `<end>`, no padding.
    """
    device = model.decoder.linear.weight.device
    real = captions[:, 1:].flatten().ne(PAD).nonzero().squeeze(1)  # found on the CPU: no GPU wait
    targets = captions[:, 1:].flatten()[real].to(device, non_blocking=True)
    images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
    features = model.encoder(torch.zeros_like(images) if blind else images)
    hidden = model.decoder.hidden(features, captions).flatten(0, 1)  # (B * (T-1), hidden_size)
    hidden = hidden.index_select(0, real.to(device, non_blocking=True))  # (targets, hidden_size)
    logits = model.decoder.linear(hidden).float()  # (targets, vocab_size)
    return F.cross_entropy(logits, targets, reduction="sum"), len(real)


@torch.no_grad()
def evaluate(model, loader, blind=False) -> tuple[float, int]:
    """(total negative log-likelihood in nats, number of real targets) over a whole split."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for images, captions, _ in loader:
        nll, tokens = caption_nll(model, images, captions, blind)
        total, count = total + nll.double(), count + tokens
    model.train(was_training)
    return float(total), count


def caption_split(model, loader, beam_size=3, max_len=20, **sampling) -> list[str]:
    """A free-running caption for every image of a `get_loader(..., mode="test")`, in order."""
    device = model.decoder.linear.weight.device
    captions = []
    for images, _ in loader:
        with torch.no_grad():
            features = model.encoder(images.to(device))
        ids = model.decoder.sample(features, beam_size, max_len, **sampling)
        captions += map(model.text, ids)
    return captions


def learning_rate(options, epoch: float) -> float:
    """One cycle (Smith & Topin, 2017): linear rise over a tenth of the run, cosine fall to 0."""
    progress = epoch / options.epochs
    if progress < 0.1:
        return options.learning_rate * progress / 0.1
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def load_split(image_dir, captions_file) -> CaptionData:
    data = CaptionData(image_dir, captions_file)
    if data.uncaptioned:
        print(f"{captions_file}: {len(data.uncaptioned)} images have no caption and are left out")
    return data


def announce(bad, data, skip):
    """Say which images cannot be read; stop the run unless they may be skipped."""
    names = "\n  ".join(bad[row] for row in sorted(bad))
    found = f"{len(bad)} of {len(data)} images cannot be read:\n  {names}"
    if not skip or len(bad) == len(data):
        raise BadImageError(f"{found}\nreplace them, or leave them out with --skip-bad-images")
    print(f"{found}\nleft out, with their captions")


def build_model(options, vocab) -> CaptionModel:
    return CaptionModel(
        vocab.words, options.backbone, options.weights, options.fine_tune,
        options.image_size, options.embed_size, options.hidden_size, options.num_layers,
        options.dropout, options.inject,
    )  # fmt: skip


def pick_device(name) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {name!r} cannot be used here ({reason})") from None
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def get_rng(device) -> dict:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng(states, device):
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def progress_bar(batches, title):
    """A bar on standard output, gone when it is full: a notebook keeps no trace of it."""
    return tqdm(batches, title, leave=False, file=sys.stdout, mininterval=1, unit="batch")


def summary(line) -> str:
    """A line of the history, for people and grep."""
    return (
        f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.3f} "
        f"perplexity {line['train_perplexity']:.2f}  val loss {line['val_loss']:.3f} "
        f"perplexity {line['val_perplexity']:.2f}  {line['captions_per_second']:.0f} captions/s"
    )


# ---------------------------------------------------------------------------- files


def write_atomically(text: str, path: Path):
    """The file appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save_atomically(checkpoint, path: Path):
    """torch.save, whole or not at all: a full disk or a power cut leaves the earlier file alone."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full? What was saved "
            "before is intact; free some space and go on with --resume"
        ) from None


# ---------------------------------------------------------------------------- command line


def parse(arguments=None) -> Options:
    """The command line's flags are the fields of Options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Options):
        flag, settings = "--" + f.name.replace("_", "-"), {"help": f.metadata["help"]}
        if f.type in (bool, "bool"):
            settings["action"] = "store_true"
        elif f.default is MISSING:
            settings["required"] = True
        else:
            settings |= {"default": f.default, "type": type(f.default)}
        parser.add_argument(flag, **settings)
    options = Options(**vars(parser.parse_args(arguments)))
    if str(options.weights).lower() == "none":
        options.weights = None
    return options


def main(arguments=None) -> int:
    options = parse(arguments)
    try:
        trainer = Trainer(options)
        print(
            f"{len(trainer.train_data)} training and {len(trainer.val_data)} validation images, "
            f"{len(trainer.vocab)} words, on {trainer.device}"
        )
        trainer.fit()
        print(json.dumps(trainer.report(), indent=2))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
