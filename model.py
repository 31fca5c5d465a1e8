"""CNN encoder and LSTM decoder for image captioning.

    model = CaptionModel.from_checkpoint("runs/synthetic/best.pt")   # or CaptionModel.pretrained()
    model.caption("photo.jpg")                    # ["a dog runs across the grass"]
    model.card["summary"]                         # what the model was trained on

    encoder = EncoderCNN(embed_size=256)          # ResNet50, frozen, and a trainable linear layer
    decoder = DecoderRNN(embed_size=256, hidden_size=512, vocab_size=len(vocab))
    logits = decoder(encoder(images), captions)   # (B, T-1, vocab_size), for captions[:, 1:]

The model is that of Show and Tell (Vinyals et al., 2015, arXiv:1411.4555). Tanti et al. (2018,
arXiv:1703.09137) compare the ways in which the image can enter the LSTM.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from captioning.base.distributed import autocast, resolve_precision
from captioning.base.tokens import PAD
from captioning.data.images import eval_transform
from captioning.decoding import search as decoding
from captioning.learning.card import NOT_RECORDED, card_of
from captioning.learning.checkpoint import config_and_words, load_safely
from captioning.learning.options import ModelConfig
from captioning.networks.attention import AttentionDecoder
from captioning.networks.backbones import input_settings
from captioning.networks.encoder import EncoderCNN
from captioning.networks.layers import Dropout, eval_mode
from vocabulary import Vocabulary

INJECT_MODES = ("pre", "par", "init")  # of `DecoderRNN`
DEFAULTS = ModelConfig
PRETRAINED = Path(__file__).parent / "pretrained" / "photo_captioner.pt"  # trained on photographs


# ---------------------------------------------------------------------------- decoder


class DecoderRNN(nn.Module):
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
        self,
        embed_size,
        hidden_size,
        vocab_size,
        num_layers=DEFAULTS.num_layers,
        dropout=DEFAULTS.dropout,
        inject=DEFAULTS.inject,
    ):
        super().__init__()
        if inject not in INJECT_MODES:
            raise ValueError(f"unknown inject mode {inject!r}; choose from {INJECT_MODES}")
        self.inject = inject
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=PAD)
        input_size = 2 * embed_size if inject == "par" else embed_size
        lstm_dropout = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(
            input_size, hidden_size, num_layers, batch_first=True, dropout=lstm_dropout
        )
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(hidden_size, vocab_size)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):  # forget-gate bias 1 (Jozefowicz et al., 2015)
                nn.init.ones_(bias[hidden_size : 2 * hidden_size])
        if inject == "init":
            self.image_to_state = nn.Linear(embed_size, 2 * num_layers * hidden_size)

    def forward(self, features, captions, positions=None, image_index=None):
        """Teacher forcing: (B, embed_size), (B, T) -> logits (B, T-1, vocab_size).

        image_index: (B,), the row of `features` that belongs to each caption; None: the same row.
        positions: (N,) indices into the B * (T-1) predictions. The vocabulary projection, which
            dominates the cost, is then computed for these alone: logits (N, vocab_size).
        """
        if image_index is not None:
            features = features.index_select(0, image_index)  # (B, embed_size)
        inputs = self.embed(captions[:, :-1], features)  # (B, T-1, input_size)
        hidden, _ = self.lstm(inputs, self.init_state(features))  # (B, T-1, hidden_size)
        hidden = self.dropout(hidden)
        if positions is not None:
            hidden = hidden.flatten(0, 1).index_select(0, positions)  # (N, hidden_size)
        return self.linear(hidden)

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
        """(B,), state, (B, embed_size) -> logits (B, vocab_size) of the next word, state, None.

        An `AttentionDecoder` returns its attention in place of None.
        """
        hidden, state = self.lstm(self.embed(tokens.unsqueeze(1), features), state)
        return self.linear(self.dropout(hidden.squeeze(1))), state, None

    def sample(self, features, beam_size=1, max_len=20, **options) -> decoding.Decoded:
        """Generate captions in eval mode; `options` are those of `decoding.generate`."""
        with eval_mode(self):
            return decoding.generate(self, features, beam_size, max_len, **options)


# ---------------------------------------------------------------------------- captioning model


class CaptionModel(nn.Module):
    """Encoder, decoder and vocabulary: everything that is needed to caption an image.

    card: the model card, a dict that says what the model was trained on; see card.py.
    """

    def __init__(self, words, config: ModelConfig | None = None, weights="DEFAULT"):
        """words: the words of the vocabulary. weights: of the backbone, as in `EncoderCNN`."""
        super().__init__()
        self.config = c = config or ModelConfig()
        self.vocab = Vocabulary(words)
        self.card = dict(NOT_RECORDED)
        self.transform = eval_transform(**input_settings(c.backbone, c.image_size))
        self.encoder = EncoderCNN(
            c.embed_size,
            c.backbone,
            weights,
            c.fine_tune,
            c.image_size,
            c.flip,
            c.no_image,
            c.precision,
            c.image_norm,
            c.feature_dropout,
            pooled=c.inject != "attend",
        )
        sizes = c.embed_size, c.hidden_size, len(self.vocab)
        if c.inject == "attend":
            self.decoder = AttentionDecoder(*sizes, c.dropout, c.num_heads)
        else:
            self.decoder = DecoderRNN(*sizes, c.num_layers, c.dropout, c.inject)

    def checkpoint(self) -> dict:
        """What `from_checkpoint` needs: config, words and weights; and the model card."""
        return {
            "config": asdict(self.config),
            "words": self.vocab.words,
            "model": self.state_dict(),
            "card": self.card,
        }

    @classmethod
    def from_checkpoint(cls, path, device="cpu", precision=None):
        """Load a trained model in eval mode. The file is self-contained, and no code in it is run.

        precision: override that of the checkpoint.

        Raises FileNotFoundError, or ValueError for a file that is damaged or not a checkpoint.
        """
        checkpoint = load_safely(path)
        try:
            config, words = config_and_words(checkpoint)
            config = ModelConfig(**config | ({"precision": precision} if precision else {}))
            model = cls(words, config, weights=None)
            model.load_state_dict(checkpoint["model"])
            model.card = card_of(checkpoint)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this model ({type(error).__name__}: "
                f"{str(error)[:300]}); train.py writes best.pt and last.pt"
            ) from None
        resolve_precision(device, config.precision)  # fail now, not at the first image
        return model.to(device).eval()

    @classmethod
    def pretrained(cls, device="cpu", precision=None):
        """The model in photo_captioner.pt beside model.py, which was trained on photographs.

        Raises FileNotFoundError if there is no such file, else as `from_checkpoint`.
        """
        if not PRETRAINED.is_file():
            raise FileNotFoundError(
                f"there is no pre-trained model {PRETRAINED}: get that file, or train a model with "
                "train.py and load its best.pt"
            )
        return cls.from_checkpoint(PRETRAINED, device, precision)

    @property
    def device(self):
        return self.decoder.linear.weight.device

    def autocast(self):
        """The precision of the config, as a context manager."""
        return autocast(self.device, self.config.precision)

    def encode(self, images, precomputed=False):
        """Images (B, 3, H, W), or what `EncoderCNN.project` takes -> the memory of the decoder."""
        return self.encoder.project(images) if precomputed else self.encoder(images)

    def forward(self, images, captions):
        """(B, 3, H, W), (B, T) -> logits (B, T-1, vocab_size); see `DecoderRNN`."""
        return self.decoder(self.encoder(images), captions)

    def generate(self, images, precomputed=False, **options) -> decoding.Decoded:
        """Captions of a batch as token ids; `options` are those of `decoding.generate`."""
        with eval_mode(self), self.autocast():
            images = images.to(self.decoder.linear.weight)  # device, and dtype of a converted model
            memory = self.encode(images, precomputed)
            return decoding.generate(self.decoder, memory, **options)

    def decode(self, decoded: decoding.Decoded) -> list:
        """Token ids as captions: a list of strings, or of lists of strings with `n_best`."""
        if decoded.tokens.dim() == 3:
            return [[self.vocab.decode(ids) for ids in row] for row in decoded.tokens.tolist()]
        return [self.vocab.decode(ids) for ids in decoded.tokens.tolist()]

    def preprocess(self, images):
        """A list of images (paths or PIL images) -> (B, 3, H, W). Raises BadImageError."""
        return torch.stack([self.transform(image) for image in images])

    @staticmethod
    def concatenate(batches):
        """Several results of `preprocess` as one batch."""
        return torch.cat(batches)

    def caption(
        self, images, beam_size=None, max_len=20, batch_size=32, return_attention=False, **options
    ) -> list:
        """Caption an image (path or PIL image) or an iterable of images; returns a list of strings.

        `options` are those of `decoding.generate`; the beam size is 3 unless a temperature is
        given. With `n_best`, returns a list of strings per image. Raises BadImageError.

        return_attention: also return a list with the attention weights of each image, (words, H, W)
            if the P positions form a square, else (words, P); `<end>` is left out. Raises
            ValueError if the model has no attention.
        """
        images = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        if beam_size is None:
            beam_size = 1 if options.get("temperature") else 3
        captions, maps = [], []
        for start in range(0, len(images), batch_size):
            batch = self.preprocess(images[start : start + batch_size])
            decoded = self.generate(batch, beam_size=beam_size, max_len=max_len, **options)
            captions += self.decode(decoded)
            maps += self.attention_maps(decoded) if return_attention else []
        return (captions, maps) if return_attention else captions

    @staticmethod
    def attention_maps(decoded: decoding.Decoded) -> list:
        """The attention of each caption, see `caption`. Raises ValueError if there is none."""
        if decoded.attention is None or decoded.tokens.dim() == 3:
            raise ValueError(
                "attention maps need a model with --inject attend (in an ensemble, all of them, "
                "with the same number of positions), and no n_best"
            )
        side = round(decoded.attention.size(2) ** 0.5)
        maps = decoded.attention.float().cpu().numpy()  # (B, L, P)
        words = decoded.tokens.ne(PAD).sum(1) - decoded.ended.long()
        maps = [weights[:count] for weights, count in zip(maps, words.tolist(), strict=True)]
        square = side * side == decoded.attention.size(2)
        return [weights.reshape(-1, side, side) if square else weights for weights in maps]
