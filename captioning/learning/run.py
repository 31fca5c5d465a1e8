"""A training run: its parts (model, loaders, optimizer), built from a config.

run = build_run(TrainConfig(train_images=..., out="runs/mine"))
run.model, run.train_loader, run.optimizer, run.progress.history
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from captioning.base.distributed import (
    pick_device,
    print0,
    rank_and_world_size,
    resolve_precision,
    to_float64,
    use_deterministic_algorithms,
    wrap_ddp,
)
from captioning.base.tokens import UNK
from captioning.data.coco import CocoCaptions
from captioning.data.features import describe_bad, extract_features, find_bad_images
from captioning.data.images import BadImageError, CropTransform, train_transform
from captioning.learning.card import training_card
from captioning.learning.checkpoint import find_earlier_run, modification_times, restore
from captioning.learning.losses import SelfCritical, TeacherForcing
from captioning.learning.options import ARCHITECTURE, ModelConfig, TrainConfig
from captioning.learning.reward import CiderD
from captioning.networks.backbones import input_settings
from data_loader import tokenize_all, train_loader, val_loader
from model import CaptionModel
from vocabulary import Vocabulary

NEW_WORDS_LOG_ODDS = -2.0  # of the words that a checkpoint lacks against its <unk>, at first
FEW_UPDATES = 200  # a run with fewer optimizer steps prints a warning


@dataclass
class Progress:
    """How far a run has got: the completed epochs, and the batches of the current one."""

    history: list = field(default_factory=list)  # a dict of results per epoch
    step: int = 0  # batches of the current epoch
    totals: torch.Tensor | None = None  # sums of what the loss returned for these batches
    seconds: float = 0.0  # duration of their training

    @property
    def epoch(self) -> int:
        """The number of completed epochs. The history may begin with epoch 0, before training."""
        return self.history[-1]["epoch"] if self.history else 0


@dataclass
class Run:
    """What `build_run` builds and `fit` trains."""

    config: TrainConfig
    model: CaptionModel
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train_loader: torch.utils.data.DataLoader
    val_loader: torch.utils.data.DataLoader
    progress: Progress
    checkpoint_times: list  # `modification_times` of --out when last read or written
    reward: CiderD | None = None  # of self-critical training

    @property
    def precision(self) -> str:
        """The precision that the run computes in: "float32" or "bfloat16"."""
        return resolve_precision(self.model.device, self.config.precision)


def build_run(config: TrainConfig) -> Run:
    """Read the captions, build vocabulary and model, and extract features, or resume.

    With torchrun, every process builds a run, trains on its part of each batch, and rank 0 writes.
    Raises ValueError or OSError, with a sentence that says what is wrong and what to do, before
    anything is written to --out.
    """
    device = pick_device(config.device)
    resolve_precision(device, config.precision)  # raises if it is not supported
    if config.deterministic:
        use_deterministic_algorithms()
    times = modification_times(config.out)
    earlier = find_earlier_run(config)
    if config.resume and earlier is None:
        last = Path(config.out) / "last.pt"
        print0(f"There is no {last} to resume from yet: a new run is started.")
    train_data = CocoCaptions(config.train_images, config.train_captions)
    val_data = CocoCaptions(config.val_images, config.val_captions)
    torch.manual_seed(config.seed)
    model = build_model(config, train_data).to(device)
    loaders = build_loaders(config, model, train_data, val_data)
    splits = [loader.dataset.data for loader in loaders]
    model.card = training_card(config, *splits, source=model.card if config.init_from else None)
    loss, reward, totals = build_loss(config, model, loaders[0].dataset)
    progress = Progress(totals=to_float64(torch.zeros(totals, device=device)))
    optimizer = build_optimizer(model, config)
    run = Run(config, model, wrap_ddp(loss), optimizer, *loaders, progress, times, reward)
    warn_about_few_updates(run)
    # Another seed on every rank, so that their dropout masks and samples differ.
    torch.manual_seed(config.seed + 1000 * rank_and_world_size()[0])
    if earlier:
        restore(run, earlier)
    return run


def build_model(config, train_data) -> CaptionModel:
    """A new model with the vocabulary of the training captions, or that of `config.init_from`.

    The latter keeps its words and their indices. Training with cross-entropy adds the words that
    it lacks; self-critical training does not, because the samples would not contain them.
    """
    counts = tokenize_all(train_data.all_captions, config.cache_dir).counts()
    if config.init_from is None:
        vocab = Vocabulary.from_counts(counts, config.min_word_freq)
        return CaptionModel(vocab.words, config.model_config(), config.weights)
    source = CaptionModel.from_checkpoint(config.init_from)
    check_architecture(source.config, config)
    vocab = source.vocab
    if config.loss == "cross-entropy":
        vocab = vocab.extended(counts, config.min_word_freq)
    new = vocab.words[len(source.vocab) :]
    if new:
        print0(f"{len(new)} new words: {', '.join(new[:10])}{', ..' if new[10:] else ''}")
    model = CaptionModel(vocab.words, config.model_config(), weights=None)
    model.load_state_dict(with_new_words(source.state_dict(), len(new)))
    model.card = source.card
    return model


def check_architecture(source: ModelConfig, config):
    """Raise ValueError if a model with the config `source` cannot be continued with `config`."""
    different = [
        f"{name} {getattr(source, name)}, not {getattr(config, name)}"
        for name in ARCHITECTURE
        if getattr(source, name) != getattr(config, name)
    ]
    if different:
        raise ValueError(
            f"the model in {config.init_from} has {'; '.join(different)}: leave such options out"
        )
    if config.weights not in (None, "DEFAULT"):
        print0(f"The weights of the CNN are those in {config.init_from}, not {config.weights}.")


def with_new_words(state: dict, count: int) -> dict:
    """The state dict of a model with `count` words more, behind those of its vocabulary.

    A new word has the embedding and the output weights of `<unk>`, as which it was read and
    predicted so far. All new words together have a probability of e^NEW_WORDS_LOG_ODDS times that
    of `<unk>` (14 %), so that they hardly change the captions before they are learned.
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


def build_loaders(config, model, train_data, val_data):
    """(train_loader, val_loader), of images if the whole CNN is trained, and else of features."""
    (train_features, train_bad), (val_features, val_bad) = (
        image_features(config, model, data) for data in (train_data, val_data)
    )
    exclude_bad_images([train_data, val_data], [train_bad, val_bad], config.skip_bad_images)
    settings = input_settings(config.backbone, config.image_size)
    crops = [
        image_features(config, model, train_data, CropTransform(seed, **settings))[0]
        for seed in range(config.crops)
    ]
    train_data, val_data = train_data.without(train_bad), val_data.without(val_bad)
    rank, world_size = rank_and_world_size()
    options = {"cache_dir": config.cache_dir, "rank": rank, "world_size": world_size}
    captions = batch_size = config.batch_size
    if config.group_images:
        per_image = len(train_data.all_captions) / len(train_data)
        captions = config.batch_size * config.grad_accum_steps
        batch_size = max(round(captions / per_image), world_size)
    if config.fine_tune == "all":
        options["num_workers"] = config.num_workers
    return (
        train_loader(
            train_data,
            model.vocab,
            transform=train_transform(**settings),
            features=train_features,
            crops=crops,
            seed=config.seed,
            batch_size=batch_size,
            group_images=config.group_images,
            **options,
        ),
        val_loader(
            val_data,
            model.vocab,
            transform=model.transform,
            features=val_features,
            batch_size=captions,
            group_images=config.group_images,
            **options,
        ),
    )


def image_features(config, model, data, transform=None):
    """(features of all images or None, {index: reason} for those that cannot be read).

    transform: None: that of the model.
    """
    transform = transform or model.transform
    if config.fine_tune == "all":  # features that change cannot be cached
        return None, find_bad_images(data.paths, transform, config.num_workers)
    extracted = extract_features(
        model.encoder,
        data.paths,
        transform,
        config.cache_dir,
        num_workers=config.num_workers,
        skip_bad=True,
    )
    return extracted.features, extracted.bad


def exclude_bad_images(splits, bad, skip):
    """Print which images are excluded; raise BadImageError for unreadable ones unless `skip`."""
    for split in splits:
        if split.uncaptioned:
            count = len(split.uncaptioned)
            print0(f"{split.captions_file}: {count} images have no caption and are excluded")
    reasons = [reason for of_split in bad for reason in of_split.values()]
    if not reasons:
        return
    found = describe_bad(reasons)
    if not skip:
        raise BadImageError(f"{found}\nreplace them, or exclude them with --skip-bad-images")
    print0(f"{found}\nThey are excluded, with their captions.")
    for split, of_split in zip(splits, bad, strict=True):
        if len(of_split) == len(split):
            raise BadImageError(f"no image of {split.captions_file} can be read")


def build_loss(config, model, dataset):
    """(the loss, its reward or None, how many numbers it returns)."""
    precomputed = config.fine_tune != "all"
    if config.loss == "cross-entropy":
        return TeacherForcing(model, precomputed, config.label_smoothing), None, 2
    reward = CiderD(dataset.ids, dataset.lengths, dataset.image_rows, len(model.vocab))
    loss = SelfCritical(
        model, reward, precomputed, samples=config.samples, xe_weight=config.xe_weight
    )
    return loss, reward, 4


def build_optimizer(model, config):
    """AdamW with two parameter groups: weight matrices decay; biases, embeddings, norms do not.

    If the CNN or a part of it is trained, it has two groups of its own.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decays = {n for n, p in trained.items() if p.dim() > 1 and "embedding" not in n}
    cnn = {n for n in trained if n.startswith("encoder.backbone.")}
    rates = {False: config.learning_rate}
    if cnn:
        rates[True] = config.backbone_learning_rate
    groups = [
        {
            "params": [
                p for n, p in trained.items() if (n in cnn) == part and (n in decays) == decay
            ],
            "weight_decay": config.weight_decay if decay else 0.0,
            "max_lr": rate,
        }
        for part, rate in rates.items()
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def warn_about_few_updates(run: Run):
    updates = run.config.epochs * -(-len(run.train_loader) // run.config.batches_per_update)
    if updates < FEW_UPDATES and run.config.init_from is None:
        print0(
            f"The run has only {updates} optimizer steps, which is hardly enough: with so few "
            "captions try --batch-size 8 --grad-accum-steps 1, and more --epochs."
        )
