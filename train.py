"""Train a captioning model: on a CPU, a GPU, or several processes; from a notebook or a shell.

    python train.py --train-images train2017 --train-captions annotations/captions_train2017.json \
                    --val-images val2017 --val-captions annotations/captions_val2017.json \
                    --out runs/coco
    python train.py ... --out runs/coco --resume       # continue after an interruption

    run = build_run(TrainConfig(train_images=..., out="runs/mine"))    # in a notebook
    history = fit(run)

Written to `--out`: best.pt (the best epoch on validation), last.pt (everything needed to resume),
history.jsonl (one line per epoch), vocabulary.json and metrics.json.
"""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from captioning.base.checkpoints import load_checkpoint
from captioning.base.commands import exit_status
from captioning.base.device import pick_device, resolve_precision
from captioning.base.distributed import barrier, print0, process_group, rank_and_world_size
from captioning.base.files import write_text
from captioning.base.options import names_with
from captioning.base.tokens import UNK
from captioning.data.coco import CocoCaptions
from captioning.data.images import train_transform
from captioning.learning.card import OWN, training_card
from captioning.learning.inputs import prepare_images
from captioning.learning.loop import fit
from captioning.learning.losses import SelfCritical, TeacherForcing
from captioning.learning.optimizer import build_optimizer
from captioning.learning.reward import CiderD
from captioning.learning.run import Run
from captioning.learning.run_files import digest_of, find_earlier_run, lock_run_dir, restore
from captioning.learning.train_config import TrainConfig, parse_args
from captioning.networks.backbones import input_settings
from captioning.scoring.evaluation import evaluate_split
from data_loader import CaptionDataset, ImageDataset, get_loader
from model import CaptionModel, ModelConfig
from vocabulary import Vocabulary, count_words

VAL_BATCH_SIZE = 512  # captions
NEW_WORDS_LOG_ODDS = -2.0  # of all new words together against `<unk>`, at first
FEW_UPDATES = 200  # a run with fewer optimizer steps prints a warning


# ---------------------------------------------------------------------------- building a run


def build_run(config: TrainConfig, backbone=None) -> Run:
    """Read the captions, build vocabulary and model, and extract features, or resume.

    backbone: an nn.Module of your own as CNN, with its weights, see `CaptionModel`.

    With torchrun, every process builds a run, trains on its part of each batch, and rank 0 writes.
    From here to the end of `fit`, no other run can use --out.
    Raises ValueError or OSError, with a sentence that says what is wrong and what to do, before
    anything of an earlier run in --out is changed.
    """
    check_paths(config)
    if backbone is not None:
        config = replace(config, backbone=type(backbone).__name__, weights=OWN)
    device = pick_device(config.device)
    resolve_precision(device, config.precision)  # raises if it is not supported
    with lock_run_dir(config.out) as lock:  # which an error releases
        earlier = find_earlier_run(config)
        run = assemble_run(config, device, backbone)
        if earlier:
            restore(run, earlier)
        elif config.resume:
            print0(f"There is no last.pt in {config.out} to resume from yet: a new run is started.")
        warn_about_few_updates(run)
        run.lock = lock.pop_all()
    return run


def check_paths(config):
    """Raise ValueError for a path that is missing, or that cannot be a folder."""
    missing = [name for name in names_with(config, "required") if getattr(config, name) is None]
    if missing:
        raise ValueError(f"the config has no {', '.join(missing)}; give their paths")
    if Path(config.cache_dir).is_file():
        raise ValueError(f"{config.cache_dir} is a file, not a folder; choose another --cache-dir")


def assemble_run(config, device, backbone) -> Run:
    """A run at its beginning."""
    train_data = CocoCaptions(config.train_images, config.train_captions)
    val_data = CocoCaptions(config.val_images, config.val_captions)
    torch.manual_seed(config.seed)
    model = build_model(config, train_data, backbone).to(device)
    train_set, val_set = build_datasets(config, model, train_data, val_data)
    source = model.card if config.init_from else None
    model.card = training_card(config, train_set.data, val_set.data, source)
    run = Run(
        config,
        model,
        build_loss(config, model, train_set),
        build_optimizer(model, config),
        *build_loaders(config, train_set, val_set),
        val_images=ImageDataset(val_set.data, val_set.transform, val_set.features),
        data_digest=digest_of(train_set.data, val_set.data),
    )
    # Another seed on every rank, so that their dropout masks and samples differ.
    torch.manual_seed(config.seed + 1000 * rank_and_world_size()[0])
    return run


def build_model(config, train_data, backbone=None) -> CaptionModel:
    """A new model with the vocabulary of the training captions, or that of `config.init_from`.

    The latter keeps its words and their indices. Training adds the words that it lacks; only
    self-critical training does not, because the samples would not contain them.
    """
    if config.init_from is None:
        vocab = Vocabulary.build(train_data.all_captions, config.min_word_freq)
        return CaptionModel(vocab, config.model_config(), config.weights, backbone)
    source = CaptionModel.from_checkpoint(config.init_from, backbone=backbone)
    different = [
        f"{name} {getattr(source.config, name)}, not {getattr(config, name)}"
        for name in names_with(ModelConfig, "fits")
        if getattr(source.config, name) != getattr(config, name)
    ]
    if different:
        raise ValueError(
            f"the model in {config.init_from} has {'; '.join(different)}: leave such options out"
        )
    if config.weights not in (None, "DEFAULT", OWN):
        print0(f"The weights of the CNN are those in {config.init_from}, not {config.weights}.")
    vocab = source.vocab
    if config.loss != "self-critical":
        vocab = vocab.extended(count_words(train_data.all_captions), config.min_word_freq)
    new = vocab.words[len(source.vocab) :]
    if new:
        print0(f"{len(new)} new words: {', '.join(new[:10])}{', ..' if new[10:] else ''}")
    model = CaptionModel(vocab, config.model_config(), None, backbone)
    model.load_state_dict(with_new_words(source.state_dict(), len(new)))
    model.card = source.card
    if config.fine_tune == "none":  # otherwise the features change
        model.confidence, model.detector = source.confidence, source.detector
    return model


def with_new_words(state: dict, count: int) -> dict:
    """The state dict of a model with `count` words more, behind those of its vocabulary.

    A new word has the embedding and the output weights of `<unk>`, as which it was read and
    predicted so far. All new words together have 14 % of the probability of `<unk>`
    (e^NEW_WORDS_LOG_ODDS), so that they hardly change the captions before they are learned.
    """
    if count == 0:
        return state
    bias = state["decoder.linear.bias"]
    rows = {
        "decoder.embedding.weight": state["decoder.embedding.weight"][UNK].expand(count, -1),
        "decoder.linear.weight": state["decoder.linear.weight"][UNK].expand(count, -1),
        "decoder.linear.bias": (bias[UNK] + NEW_WORDS_LOG_ODDS - math.log(count)).expand(count),
    }
    return state | {name: torch.cat([state[name], new]) for name, new in rows.items()}


def build_datasets(config, model, train_data, val_data):
    """Training and validation captions with features, or with images if the CNN is trained."""
    prepared = prepare_images(config, model, train_data, val_data)
    crop = train_transform(**input_settings(config.backbone, config.image_size))
    return [
        CaptionDataset(data, model.vocab, transform, features)
        for transform, (data, features) in zip((crop, model.transform), prepared, strict=True)
    ]


def build_loaders(config, train_set, val_set):
    rank, world_size = rank_and_world_size()
    options = {"rank": rank, "world_size": world_size}
    if config.fine_tune != "none":
        options["num_workers"] = config.num_workers
    grouped = {"group_images": config.group_images, "seed": config.seed}
    return (
        get_loader(train_set, "train", config.captions_per_batch, **grouped, **options),
        get_loader(val_set, "val", VAL_BATCH_SIZE, **options),
    )


def build_loss(config, model, train_set):
    """The loss that `config.loss` names; a new one also needs its name among the choices there."""
    if config.loss == "self-critical":
        reward = CiderD(train_set.captions_by_image())
        return SelfCritical(model, reward, config.samples, config.xe_weight)
    return TeacherForcing(model, config.label_smoothing)


def warn_about_few_updates(run: Run):
    updates = run.config.epochs * -(-len(run.train_loader) // run.config.batches_per_update)
    if updates < FEW_UPDATES and run.config.init_from is None:
        print0(
            f"The run has only {updates} optimizer steps, which is hardly enough: with so few "
            "captions try --batch-size 8 --grad-accum-steps 1, and more --epochs."
        )


# ---------------------------------------------------------------------------- command line


def report(run: Run) -> dict:
    """Evaluate best.pt on the validation images; returns the metrics and writes metrics.json."""
    barrier()  # best.pt is complete when rank 0 gets here
    out, model = Path(run.config.out), copy.deepcopy(run.model)
    model.load_state_dict(load_checkpoint(out / "best.pt")["model"])
    captions = run.train_loader.dataset.data.all_captions
    metrics = {"split": "validation", "precision": run.precision}
    metrics |= evaluate_split(model, run.val_loader, run.val_images, captions)[0]
    if rank_and_world_size()[0] == 0:
        write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


def main(arguments=None) -> int:
    def command():
        config = parse_args(arguments)
        with process_group(pick_device(config.device)):
            run = build_run(config)
            print0(
                f"{len(run.train_loader.dataset.data)} training and {len(run.val_images)} "
                f"validation images, {len(run.model.vocab)} words, {run.precision} on "
                f"{run.model.device}"
            )
            fit(run)
            print0(json.dumps(report(run), indent=2))

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
