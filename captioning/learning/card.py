"""The model card: what a model was trained on, a plain dict in every checkpoint.

card = CaptionModel.from_checkpoint("runs/x/best.pt").card
card["summary"]             # "trained on 6,091 images with 30,455 captions: .."
"""

from datetime import date
from pathlib import Path

LIMITATIONS = (
    "Captions may be wrong, also those with a high score. The model can describe only what the "
    "training images and captions contain, in the words of its vocabulary, and repeats the biases "
    "of those captions, for example about people."
)
OWN = "own"  # `weights` of a module of one's own
SCORES = {"val_perplexity": "perplexity", "val_cider": "CIDEr-D"}  # names in the history


def training_card(config, train_data, val_data, source=None) -> dict:
    """The card of a run, without what `with_results` adds.

    config: a `TrainConfig`. train_data, val_data: `CocoCaptions`, as they are used. source: the
        card of the model that the run starts from.
    """
    data = {"name": train_data.description, **_size(train_data)}
    summary = "trained on {images:,} images with {captions:,} captions: {name}".format(**data)
    card = {"summary": summary, "data": data, "encoder": _encoder(config)}
    if source is not None:
        card["initialized from"] = source["summary"]
        if source["summary"] != summary:
            card["summary"] = f"{summary}; continued from a model {source['summary']}"
        card["encoder"] = source.get("encoder", {"network": config.backbone})
        if "licence" in source:  # such as "research use only": it holds for what is made of it
            card["licence"] = source["licence"]
    return card | {"validation": _size(val_data), "limitations": LIMITATIONS}


def with_results(card: dict, history: list) -> dict:
    """The card with today's date, and with the validation scores of the last epoch, if any."""
    line = history[-1] if history else {}
    scores = {name: line[key] for key, name in SCORES.items() if key in line}
    epoch = {"epoch": line["epoch"]} if history else {}
    validation = card.get("validation", {}) | epoch | scores
    return card | {"date": date.today().isoformat(), "validation": validation}


def _size(data) -> dict:
    return {"images": len(data), "captions": len(data.all_captions)}


def _encoder(config) -> dict:
    weights = "random" if config.weights is None else Path(config.weights).name
    return {"network": config.backbone, "weights": weights, "licence": _licence(config)}


def _licence(config) -> str:
    """The licence of the pre-trained weights of the CNN, as far as it is known."""
    if config.weights is None:
        return "none: the weights were random"
    if config.backbone.startswith("timm/tf_efficientnet_lite"):
        return "Apache License 2.0 (Google's weights, trained on ImageNet)"
    if config.weights == OWN or Path(config.weights).is_file():
        return "not recorded"
    library = "timm" if config.backbone.startswith("timm/") else "torchvision"
    return f"that of {library}'s weights; the terms of their training data may apply"
