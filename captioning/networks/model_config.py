"""The options of a model."""

from dataclasses import dataclass

from captioning.base.device import PRECISIONS
from captioning.base.options import check_options, option
from captioning.networks.cnn import FINE_TUNE

INJECT = ("par", "pre", "init")  # the ways in which the image enters `DecoderRNN`


@dataclass(kw_only=True)
class ModelConfig:
    """The options of a model: everything but the words and the weights.

    `fits`: options that decide the shapes or the meaning of the weights; `sees`: further options
    that --init-from takes from the checkpoint.
    """

    backbone: str = option("resnet50", "a network of torchvision, or timm/NAME", fits=True)
    image_size: int | None = option(
        None, "side of the square input in pixels; none: the network's own", at_least=1, sees=True
    )
    flip: bool = option(False, "use the features of each image and of its flip", sees=True)
    no_image: bool = option(False, "replace the features by zeros, as a baseline", sees=True)
    fine_tune: str = option("none", "what to train of the CNN", choices=FINE_TUNE)
    embed_size: int = option(256, "size of the word and image embeddings", at_least=1, fits=True)
    image_norm: bool = option(
        False, "batch normalization of the image embedding (init, pre: True)", fits=True
    )
    hidden_size: int = option(512, "size of the LSTM state", at_least=1, fits=True)
    num_layers: int = option(1, "LSTM layers", at_least=1, fits=True)
    dropout: float = option(0.2, "dropout of word embeddings and LSTM outputs", at_least=0, below=1)
    feature_dropout: float = option(0.0, "dropout of the features of the CNN", at_least=0, below=1)
    inject: str = option(
        "par", "how the image enters the LSTM", choices=(*INJECT, "attend"), fits=True
    )
    num_heads: int = option(1, "attention heads, of inject attend", at_least=1, fits=True)
    precision: str = option(
        "auto",
        "computing precision; auto: bfloat16 where the hardware accelerates it",
        choices=PRECISIONS,
    )

    def __post_init__(self):
        check_options(self)
        if self.inject == "attend" and self.num_layers > 1:
            raise ValueError("inject attend has two LSTMs of one layer each: num_layers must be 1")
        if self.no_image and self.fine_tune != "none":
            raise ValueError("no_image replaces the features by zeros: they cannot be fine-tuned")
