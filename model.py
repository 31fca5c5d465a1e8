"""CNN encoder and LSTM decoder for image captioning.

    model = CaptionModel.pretrained()             # or CaptionModel.from_checkpoint("best.pt")
    model.caption("photo.jpg")                    # ["a dog runs across the grass"]

    encoder = EncoderCNN(embed_size=256)          # ResNet50, frozen, and a trainable linear layer
    decoder = DecoderRNN(embed_size=256, hidden_size=512, vocab_size=len(vocab))
    logits = decoder(encoder(images), captions)   # (B, T-1, vocab_size), for captions[:, 1:]

The model is that of Show and Tell (Vinyals et al., 2015, arXiv:1411.4555). Tanti et al. (2018,
arXiv:1703.09137) compare the ways in which the image can enter the LSTM.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from captioning.base.checkpoints import FORMAT, load_checkpoint
from captioning.base.device import autocast, resolve_precision, usual_defaults
from captioning.base.modules import select
from captioning.base.tokens import PAD, TOKENIZER
from captioning.data.images import eval_transform
from captioning.decoding.captioner import Captioner
from captioning.decoding.confidence import Confidence
from captioning.networks.attention import AttentionDecoder
from captioning.networks.backbones import input_settings
from captioning.networks.batch_norm import BatchNorm
from captioning.networks.cnn import CNN
from captioning.networks.decoder import Decoder, open_forget_gates, select_predictions
from captioning.networks.model_config import INJECT, ModelConfig
from captioning.networks.word_detector import WordDetector
from vocabulary import Vocabulary

PRETRAINED = Path(__file__).parent / "pretrained" / "photo_captioner.pt"


class EncoderCNN(nn.Module):
    """A pre-trained CNN without its classifier, followed by a trainable linear layer.

    pooled: one embedding per image; otherwise the CNN's features of every position, for the linear
        layers `keys` and `values` of an `AttentionDecoder`.
    feature_dropout, image_norm, no_image: as in `ModelConfig`. Other options, errors: as in `CNN`.
    """

    def __init__(
        self,
        embed_size=256,
        backbone="resnet50",
        weights="DEFAULT",
        *,
        pooled=True,
        feature_dropout=0.0,
        image_norm=False,
        no_image=False,
        **options,
    ):
        super().__init__()
        self.cnn = CNN(backbone, weights, pooled, **options)
        self.pooled, self.no_image = pooled, no_image
        self.dropout = nn.Dropout(feature_dropout)
        self.linear = nn.Linear(self.cnn.feature_size, embed_size) if pooled else nn.Identity()
        self.norm = BatchNorm(embed_size) if image_norm and pooled else nn.Identity()

    def forward(self, images):
        """(B, 3, H, W) -> (B, embed_size), or (B, P, C) if not pooled."""
        return self.project(self.cnn(images))

    def project(self, features):
        """Features of the CNN (B, P, C) -> (B, embed_size), or (B, P, C) if not pooled."""
        if self.no_image:
            features = torch.zeros_like(features)
        if self.pooled:
            features = features.mean(1)  # (B, C)
        return self.norm(self.linear(self.dropout(features)))


class DecoderRNN(Decoder):
    """An LSTM language model conditioned on an image.

    inject: how the image enters.
        "pre"   as the first input, before `<start>` (Show and Tell)
        "par"   at every step, concatenated with the word embedding
        "init"  as the initial state, through a linear layer

    Teacher forcing: of `captions[b] = <start> w1 .. wn <end> <pad> ..` the LSTM reads
    `captions[b, :-1]`, and its output at position t predicts `captions[b, t + 1]`. So every word
    and `<end>` is predicted, and `<start>` never is.
    """

    def __init__(
        self, embed_size, hidden_size, vocab_size, num_layers=1, dropout=0.2, inject="par"
    ):
        super().__init__()
        if inject not in INJECT:
            raise ValueError(f"unknown inject {inject!r}; choose from {', '.join(INJECT)}")
        self.inject = inject
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=PAD)
        input_size = 2 * embed_size if inject == "par" else embed_size
        # nn.LSTM warns about dropout between layers if there is only one.
        between_layers = {"dropout": dropout if num_layers > 1 else 0.0}
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, **between_layers)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, vocab_size)
        open_forget_gates(self.lstm)
        if inject == "init":
            self.image_to_state = nn.Linear(embed_size, 2 * num_layers * hidden_size)

    def forward(self, features, captions):
        """Teacher forcing: (B, embed_size), (B, T) -> logits (B, T-1, vocab_size)."""
        return self.predict(features, captions)

    def predict(self, features, captions, image_index=None, kept=None):
        """`forward` for images with several captions, and for some predictions: see `Decoder`."""
        features = select(features, image_index)  # (B, embed_size)
        inputs = self.embed(captions[:, :-1], features)  # (B, T-1, input_size)
        hidden, _ = self.lstm(inputs, self.init_state(features))  # (B, T-1, hidden_size)
        return self.linear(select_predictions(self.dropout(hidden), kept))

    def embed(self, tokens, features):
        """The inputs of the LSTM: (B, T), (B, embed_size) -> (B, T, input_size)."""
        inputs = self.dropout(self.embedding(tokens))  # (B, T, embed_size)
        if self.inject == "par":
            image = features.unsqueeze(1).expand(-1, inputs.size(1), -1)
            inputs = torch.cat([inputs, image], dim=-1)  # (B, T, 2 * embed_size)
        return inputs

    def init_state(self, features):
        """(B, embed_size) -> (h, c), each (num_layers, B, hidden_size), before `<start>` is read.

        Training and decoding start from this state.
        """
        layers, size = self.lstm.num_layers, self.lstm.hidden_size
        if self.inject == "init":
            state = self.image_to_state(features).view(-1, 2, layers, size)  # (B, 2, layers, size)
            h, c = state.permute(1, 2, 0, 3).contiguous()  # each (layers, B, size)
            return torch.tanh(h), c
        if self.inject == "pre":
            return self.lstm(features.unsqueeze(1))[1]
        zeros = features.new_zeros(layers, len(features), size)
        return zeros, zeros

    def step(self, tokens, state, features):
        """(B,), state, (B, embed_size) -> logits (B, vocab_size) of the next word, state, None."""
        hidden, state = self.lstm(self.embed(tokens.unsqueeze(1), features), state)
        return self.linear(self.dropout(hidden.squeeze(1))), state, None


class CaptionModel(Captioner, nn.Module):
    """Encoder, decoder and `Vocabulary`; `caption` and `score` are those of `Captioner`.

    weights: as in `CNN`. backbone: an nn.Module as CNN; config.backbone is then its class.
    card: the model card, a dict that says what the model was trained on. detector: a `WordDetector`
        that captioning uses, and confidence: a `Confidence`, or None.
    """

    def __init__(self, vocab, config: ModelConfig | None = None, weights="DEFAULT", backbone=None):
        super().__init__()
        c = config or ModelConfig()
        if backbone is not None:
            c = replace(c, backbone=type(backbone).__name__)
        self.vocab, self.config, self.detector = vocab, c, None
        self.card = {"summary": "nothing is recorded about the training data"}
        self.transform = eval_transform(**input_settings(c.backbone, c.image_size))
        self.encoder = EncoderCNN(
            c.embed_size,
            c.backbone if backbone is None else backbone,
            weights,
            pooled=c.inject != "attend",
            image_size=c.image_size,
            flip=c.flip,
            fine_tune=c.fine_tune,
            feature_dropout=c.feature_dropout,
            image_norm=c.image_norm,
            no_image=c.no_image,
        )
        sizes = c.embed_size, c.hidden_size, len(vocab)
        if c.inject == "attend":
            feature_size = self.encoder.cnn.feature_size
            self.decoder = AttentionDecoder(*sizes, feature_size, c.dropout, c.num_heads)
        else:
            self.decoder = DecoderRNN(*sizes, c.num_layers, c.dropout, c.inject)

    @property
    def device(self):
        return next(self.parameters()).device

    def autocast(self):
        """The precision of the config; of a converted or quantized model, that of its weights."""
        linear = self.decoder.linear
        own = isinstance(linear, nn.Linear) and linear.weight.dtype == torch.float32
        return autocast(self.device, self.config.precision if own else "float32")

    def forward(self, images, captions):
        """(B, 3, H, W), (B, T) -> logits (B, T-1, vocab_size); see `DecoderRNN`."""
        return self.decoder(self.encoder(images), captions)

    def encode(self, images=None, features=None):
        """Images (B, 3, H, W), or features (B, P, C) of `encoder.cnn` -> what the decoder takes."""
        weight = next(self.parameters())  # images and features get its device and dtype
        if features is None:
            features = self.encoder.cnn(images.to(self.device))
        return self.encoder.project(features.to(weight))

    @usual_defaults()
    def preprocess(self, images):
        """A list of images (paths or PIL images) -> (B, 3, H, W). Raises BadImageError."""
        return torch.stack([self.transform(image) for image in images])

    def checkpoint(self) -> dict:
        """What `from_checkpoint` needs; and the model card."""
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "words": self.vocab.words,
            "threshold": self.vocab.threshold,
            "tokenizer": TOKENIZER,
            "model": self.state_dict(),
            "card": self.card,
            "detector": self.detector and self.detector.fields(),
            "confidence": self.confidence and asdict(self.confidence),
        }

    @classmethod
    @usual_defaults()
    def from_checkpoint(cls, path, device="cpu", precision=None, backbone=None):
        """Load a trained model in eval mode. The file is self-contained, and no code in it is run.

        precision: override that of the checkpoint. backbone: if the model had an nn.Module as
        backbone, another instance of it, whose weights are replaced. Raises FileNotFoundError, or
        ValueError for a file that is damaged or not a checkpoint.
        """
        checkpoint = load_checkpoint(path)
        config = ModelConfig(**checkpoint["config"])
        config.precision = precision or config.precision
        resolve_precision(device, config.precision)  # fail now, not at the first image
        vocab = Vocabulary(checkpoint["words"], checkpoint["threshold"])
        model = cls(vocab, config, weights=None, backbone=backbone)
        model.load_state_dict(checkpoint["model"])
        model.card = checkpoint["card"]
        detector, confidence = map(checkpoint.get, ("detector", "confidence"))
        model.detector = detector and WordDetector(detector)
        model.confidence = confidence and Confidence(**confidence)
        return model.to(device).eval()

    @classmethod
    def pretrained(cls, device="cpu", precision=None):
        """The model in pretrained/photo_captioner.pt, which was trained on photographs."""
        return cls.from_checkpoint(PRETRAINED, device, precision)
