"""A CNN that looks and an LSTM that tells: the whole model, in one file.

    model = CaptionModel.from_checkpoint("runs/sample/best.pt")
    model.caption("photo.jpg")                    # ["a dog runs across the grass"]

    encoder = EncoderCNN(embed_size=256)          # ResNet50, frozen, + a trainable linear layer
    decoder = DecoderRNN(embed_size=256, hidden_size=512, vocab_size=len(vocab))
    logits = decoder(encoder(images), captions)   # (B, T-1, vocab_size), for captions[:, 1:]

The recipe is Show and Tell (Vinyals et al., 2015, arXiv:1411.4555). Tanti et al. (2018,
arXiv:1703.09137) compare the ways in which an image can enter the LSTM.
"""

import pickle
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import v2

PAD, START, END, UNK = 0, 1, 2, 3  # the first four words of every vocabulary
INJECT_MODES = ("pre", "par", "init")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------- images


class BadImageError(ValueError):
    """A file that is not an image one can read; the message names the file and the reason."""


def load_image(source, min_size: int | None = None) -> Image.Image:
    """Open an image (path or PIL image) as upright RGB, whatever its mode.

    `min_size` lets the JPEG decoder skip detail that a later resize would discard anyway: the
    result keeps both sides at or above it. (Not of an image that is open already: there the resize
    sees all detail, and the CNN's features come out a little different.) Transparent pixels become
    white. Raises BadImageError.
    """
    given = isinstance(source, Image.Image)
    name = source if isinstance(source, (str, Path)) else f"the {type(source).__name__} given"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if given else Image.open(source)
        if min_size and not given:
            image.draft("RGB", (min_size, min_size))
        image = ImageOps.exif_transpose(image)
        if max(image.size) > 50 * min(image.size):  # would take gigabytes to resize
            raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
        if image.mode.startswith(("I", "F")):  # 16 bits a pixel, which convert() would clip
            image = eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError:
        raise BadImageError(f"{name}: there is no such file") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise BadImageError(f"{name}: {error or type(error).__name__}") from None


def eight_bits(image) -> Image.Image:
    """An image of integers or floats as grey of 8 bits, whether it goes up to 65,535, 255 or 1."""
    largest = image.getextrema()[1]
    scale = 1 / 256 if largest > 255 or image.mode.startswith("I;16") else 1
    if image.mode == "F" and largest <= 1:
        scale = 255
    return image.point(lambda value: value * scale).convert("L")


def eval_transform(image_size: int = 224) -> v2.Compose:
    """Path or PIL image -> (3, image_size, image_size), normalised for ImageNet; deterministic."""
    return v2.Compose([
        v2.Lambda(partial(load_image, min_size=image_size)),
        v2.Resize(image_size, antialias=True),
        v2.CenterCrop(image_size),
        *_to_tensor(),
    ])  # fmt: skip


def train_transform(image_size: int = 224) -> v2.Compose:
    """As `eval_transform`, from a random crop: for fine-tuning, when nothing is cached.

    There is no mirroring on purpose: it would turn every "left" of a caption into a lie.
    """
    return v2.Compose([
        v2.Lambda(partial(load_image, min_size=image_size)),
        v2.RandomResizedCrop(image_size, scale=(0.7, 1.0), antialias=True),
        *_to_tensor(),
    ])  # fmt: skip


def _to_tensor():
    yield v2.ToImage()
    yield v2.ToDtype(torch.float32, scale=True)
    yield v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------------------------------------------- encoder


class EncoderCNN(nn.Module):
    """A pre-trained CNN without its classifier, and a trainable linear layer on what it sees.

    backbone: any torchvision classification network by name. Its "quantized_" ones compute in int8:
        twice as fast on a CPU and nearly as exact, but neither on a GPU nor with `fine_tune`.
    weights: torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or None.
    fine_tune: train the CNN too. Otherwise it is frozen: in eval mode whatever `train()` says, so
        that BatchNorm neither uses nor updates batch statistics, and without gradients.
    mirror: look at the mirrored image as well and take the mean, which is steadier; twice the work.
    blind: see zeros whatever the image is: the no-image baseline.

    Raises ValueError for an unknown backbone or unfit weights, ConnectionError if the weights
    cannot be downloaded.
    """

    def __init__(self, embed_size, backbone="resnet50", weights="DEFAULT", fine_tune=False,
                 image_size=224, mirror=False, blind=False):  # fmt: skip
        super().__init__()
        # Channels last is how convolutions are fastest, on CPUs and GPUs alike.
        self.backbone = build_backbone(backbone, weights).to(memory_format=torch.channels_last)
        self.fine_tune, self.mirror, self.blind = fine_tune, mirror, blind
        self.quantized = backbone.startswith("quantized_")
        if fine_tune and self.quantized:
            raise ValueError(f"{backbone} computes in int8 and cannot be fine-tuned")
        self.backbone.requires_grad_(fine_tune)
        try:
            with torch.no_grad():
                image = torch.zeros(1, 3, image_size, image_size)
                self.feature_size = self.backbone.eval()(image).numel()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{backbone} cannot see images of size {image_size}: {error}"
            ) from None
        self.linear = nn.Linear(self.feature_size, embed_size)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if not self.fine_tune:
            self.backbone.eval()
        return self

    def pool(self, images):
        """(B, 3, H, W) -> (B, feature_size): what the CNN sees, before the linear layer.

        With a frozen CNN this never changes, so it can be computed once and kept.
        """
        if self.quantized and images.device.type != "cpu":
            raise ValueError("a quantized backbone runs on the CPU only (--device cpu)")
        seen = self.backbone(images).flatten(1)
        if self.mirror:
            seen = (seen + self.backbone(images.flip(3)).flatten(1)) / 2
        return seen

    def forward(self, images):
        """(B, 3, H, W), or pooled features (B, feature_size) -> (B, embed_size)."""
        seen = self.pool(images) if images.dim() == 4 else images
        return self.linear(torch.zeros_like(seen) if self.blind else seen)


def build_backbone(name, weights):
    """The torchvision network `name` with `weights` loaded and its classifier taken off."""
    zoo = torchvision.models
    plain, quantized = (zoo.list_models(module=module) for module in (zoo, zoo.quantization))
    if name not in plain + quantized:
        known = ", ".join(plain + quantized)
        raise ValueError(f"unknown backbone {name!r}; torchvision has {known}")
    options = {"quantize": True} if name in quantized else {}
    with warnings.catch_warnings():  # of defaults that will change, in torchvision's own calls
        warnings.simplefilter("ignore")
        if weights is None or Path(weights).is_file():
            net = zoo.get_model(name, weights=None, **options)
        else:
            net = _download(name, weights, **options)
    # Inception and GoogLeNet: no auxiliary classifiers, and ImageNet's normalisation turned into
    # their own, whether the weights come from torchvision, from a file or from a checkpoint.
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(net, auxiliary):
            net.aux_logits, net.transform_input = False, True
            setattr(net, auxiliary, None)
    head = next(h for h in ("fc", "classifier", "heads", "head") if hasattr(net, h))
    setattr(net, head, nn.Identity())
    if weights is not None and Path(weights).is_file():
        state = load_safely(weights)
        heads = (f"{head}.", "AuxLogits.", "aux1.", "aux2.")
        try:
            net.load_state_dict({k: v for k, v in state.items() if not k.startswith(heads)})
        except (RuntimeError, AttributeError, KeyError) as error:
            reason = str(error)[:300]
            raise ValueError(f"{weights} does not hold weights of {name}: {reason}") from None
    return net


def _download(name, weights, **options):
    choices = torchvision.models.get_model_weights(name)
    if weights not in choices.__members__:
        raise ValueError(
            f"no weights {weights!r} for {name}: there is no such file, and torchvision has "
            f"{', '.join(choices.__members__)}"
        )
    try:
        return torchvision.models.get_model(name, weights=choices[weights], **options)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"cannot download the {name} weights ({error}); fetch {choices[weights].url} on "
            f"another machine and put it into {folder}, or pass the file's path as weights"
        ) from None


def load_safely(path, map_location="cpu"):
    """torch.load for files of unknown origin: tensors and plain values only, never code.

    Raises FileNotFoundError, or ValueError for anything damaged or foreign.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):  # PyTorch does not check the sums that it writes
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        with warnings.catch_warnings():  # torch.load itself uses what it warns of, for int8
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is no PyTorch file at all; "
            "it was not loaded, and nothing in it was run"
        ) from None
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise ValueError(f"{path} is damaged or not a PyTorch file ({error})") from None


# ---------------------------------------------------------------------------- decoder


class DecoderRNN(nn.Module):
    """An LSTM that tells an image word by word.

    inject: how the image enters.
        "pre"   as the first input, before `<start>` (Show and Tell)
        "par"   at every step, beside the word
        "init"  as the initial state, through a linear layer

    Teacher forcing, the one contract: of `captions[b] = <start> w1 .. wn <end> <pad> ..` the LSTM
    reads `captions[b, :-1]`, and its output at position t predicts `captions[b, t + 1]`. So every
    word and `<end>` is predicted, and `<start>` never is.
    """

    def __init__(
        self, embed_size, hidden_size, vocab_size, num_layers=1, dropout=0.0, inject="pre"
    ):
        super().__init__()
        if inject not in INJECT_MODES:
            raise ValueError(f"unknown injection mode {inject!r}; there are {INJECT_MODES}")
        self.inject = inject
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=PAD)
        input_size = 2 * embed_size if inject == "par" else embed_size
        between = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, vocab_size)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):  # remember, until told otherwise: what was seen lasts
                nn.init.ones_(bias[hidden_size : 2 * hidden_size])  # (Jozefowicz et al., 2015)
        if inject == "init":
            self.image_to_state = nn.Linear(embed_size, 2 * num_layers * hidden_size)

    def forward(self, features, captions):
        """(B, embed_size), (B, T) -> logits (B, T-1, vocab_size) for captions[:, 1:]."""
        return self.linear(self.hidden(features, captions))

    def hidden(self, features, captions):
        """As `forward`, one layer earlier: (B, T-1, hidden_size).

        The last layer is the dearest; a loss can apply it to the real positions alone.
        """
        hidden, _ = self.step(captions[:, :-1], self.start_state(features), features)
        return self.dropout(hidden)

    def start_state(self, features):
        """(B, embed_size) -> (h, c), each (num_layers, B, hidden_size), before `<start>` is read.

        Training and decoding both begin here.
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

    def step(self, words, state, features):
        """Read words (B, T) from `state`; return the outputs (B, T, hidden_size) and new state."""
        inputs = self.dropout(self.embedding(words))  # (B, T, embed_size)
        if self.inject == "par":
            seen = features.unsqueeze(1).expand_as(inputs)
            inputs = torch.cat([inputs, seen], dim=-1)  # (B, T, 2 * embed_size)
        return self.lstm(inputs, state)

    @torch.no_grad()
    def sample(self, features, beam_size=1, max_len=20, temperature=0.0, top_k=None,
               length_penalty=0.7, generator=None):  # fmt: skip
        """Caption freely: (B, embed_size) -> B lists of at most `max_len` word indices.

        beam_size: 1 is greedy. A beam holds the `beam_size` most probable beginnings of a caption;
            one that ends leaves the beam for good, and of those that ended the best by
            log-probability / length ** length_penalty is returned (length counts `<end>`).
        temperature: above 0, words are drawn instead, from the `top_k` likeliest if that is given.
        The lists hold words only: no `<start>`, `<end>`, `<pad>`, and never `<unk>`.
        Raises ValueError for settings that contradict each other, or if the model computes NaN.
        """
        smallest = min(beam_size, max_len, 1 if top_k is None else top_k)
        if smallest < 1 or not temperature >= 0:
            raise ValueError("beam_size, max_len and top_k are 1 or more, temperature 0 or more")
        if temperature and beam_size > 1:
            raise ValueError("a beam searches and a temperature draws: choose one of them")
        if top_k is not None and not temperature:
            raise ValueError("top_k limits what is drawn: it needs a temperature above 0")
        if not length_penalty >= 0:
            raise ValueError("length_penalty is 0 (plain log-probability) or more")
        choose = partial(draw, temperature, top_k, generator) if temperature else torch.topk
        was_training = self.training
        self.eval()
        try:
            return beam_search(self, features, beam_size, max_len, length_penalty, choose)
        finally:
            self.train(was_training)


def beam_search(decoder, features, beam_size, max_len, length_penalty, choose=torch.topk):
    """All images at once; see `DecoderRNN.sample`.

    n counts the images still worked on and k the beams of each: 1 at `<start>`, then beam_size.
    """
    n, vocab_size = len(features), decoder.linear.out_features
    image = torch.arange(n, device=features.device)  # (n,) which image each row is about
    best = image.new_zeros(n, max_len)  # the best caption that has ended, <pad> behind it
    best_score = features.new_full((n,), -torch.inf, dtype=torch.float32)
    state = decoder.start_state(features)
    words = image.new_full((n, 1), START)  # (n, k) the last word of every beam
    told = image.new_empty(n, 1, 0)  # (n, k, length) all its words
    scores = best_score.new_zeros(n, 1)  # (n, k) its log-probability, -inf once it has ended

    for length in range(1, max_len + 1):
        k = words.size(1)
        seen = features[image].repeat_interleave(k, dim=0)  # (n*k, embed_size)
        hidden, state = decoder.step(words.view(-1, 1), state, seen)
        logits = decoder.linear(hidden[:, 0]).float()  # (n*k, vocab_size)
        logits[:, [PAD, START, UNK]] = -torch.inf
        total = scores.unsqueeze(2) + logits.log_softmax(-1).view(-1, k, vocab_size)
        if total[:, :, END].isnan().any():  # softmax spreads a NaN over all words
            raise ValueError("the model computes NaN: its weights or the features are damaged")
        scores, index = choose(total.flatten(1), min(beam_size, k * vocab_size))  # (n, beam_size)
        parent, words = index // vocab_size, index % vocab_size
        told = torch.cat([told.take_along_dim(parent.unsqueeze(2), 1), words.unsqueeze(2)], dim=2)

        # Captions that end here leave the beam; the best of them may be the best so far.
        ended = words == END
        score, which = (scores / length**length_penalty).masked_fill(~ended, -torch.inf).max(1)
        better = score > best_score[image]
        best_score[image[better]] = score[better]
        best[image[better], :length] = told[better, which[better]]
        scores = scores.masked_fill(ended, -torch.inf)

        # A score only falls, so at best a beam keeps it up to max_len: when that is not enough to
        # beat the best ended caption, the image is done.
        hope = scores.max(1).values / max_len**length_penalty
        going = hope > best_score[image]
        if not going.any():
            break
        rows = torch.arange(len(image), device=image.device).unsqueeze(1) * k + parent
        state = tuple(s.index_select(1, rows[going].flatten()) for s in state)
        image, words, told, scores = image[going], words[going], told[going], scores[going]
    else:  # out of length: an image none of whose beams ended gets its likeliest beginning
        silent = best_score[image] == -torch.inf
        likeliest = scores[silent].argmax(1)
        best[image[silent]] = told[silent, likeliest]
    return [[word for word in row if word not in (PAD, END)] for row in best.tolist()]


def draw(temperature, top_k, generator, total, _):
    """Draw one word per row of log-probabilities (n, vocab_size); stands in for torch.topk."""
    logits = (total - total.max(1, keepdim=True).values) / temperature
    if top_k is not None and top_k < logits.size(1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    index = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return total.gather(1, index), index


# ---------------------------------------------------------------------------- both


class CaptionModel(nn.Module):
    """Encoder, decoder and the words: all it takes to caption an image.

    Every argument but `weights` is kept in `config`, from which a checkpoint rebuilds the model.
    """

    def __init__(self, words, backbone="resnet50", weights="DEFAULT", fine_tune=False,
                 image_size=224, mirror=False, blind=False, embed_size=256, hidden_size=512,
                 num_layers=1, dropout=0.0, inject="pre"):  # fmt: skip
        super().__init__()
        self.config = {
            "words": list(words), "backbone": backbone, "fine_tune": fine_tune,
            "image_size": image_size, "mirror": mirror, "blind": blind,
            "embed_size": embed_size, "hidden_size": hidden_size, "num_layers": num_layers,
            "dropout": dropout, "inject": inject,
        }  # fmt: skip
        self.words = list(words)
        self.transform = eval_transform(image_size)
        self.encoder = EncoderCNN(
            embed_size, backbone, weights, fine_tune, image_size, mirror, blind
        )
        self.decoder = DecoderRNN(
            embed_size, hidden_size, len(self.words), num_layers, dropout, inject
        )

    @classmethod
    def from_checkpoint(cls, path, device="cpu"):
        """The trained model, ready to caption. The file is all it needs, and no code in it runs.

        Raises FileNotFoundError, or ValueError for a damaged file or one from something else.
        """
        checkpoint = load_safely(path)
        try:
            model = cls(weights=None, **checkpoint["config"])
            model.load_state_dict(checkpoint["model"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this model ({type(error).__name__}: "
                f"{str(error)[:300]}); "
                "train.py writes best.pt and last.pt"
            ) from None
        return model.to(device).eval()

    def forward(self, images, captions):
        """(B, 3, H, W), (B, T) -> logits (B, T-1, vocab_size); see `DecoderRNN`."""
        return self.decoder(self.encoder(images), captions)

    def text(self, ids):
        """Word indices, as `DecoderRNN.sample` returns them, as a caption."""
        return " ".join(self.words[index] for index in ids)

    @torch.no_grad()
    def caption(self, images, beam_size=None, max_len=20, batch_size=32, **sampling):
        """Caption a path, a PIL image, or several of them; returns a list of strings.

        `sampling` goes to `DecoderRNN.sample`; the beam is 3 wide unless words are drawn by a
        temperature. Raises BadImageError for what is no image.
        """
        images = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        if beam_size is None:
            beam_size = 1 if sampling.get("temperature") else 3
        weight = self.decoder.linear.weight
        was_training, captions = self.training, []
        self.eval()
        try:
            for start in range(0, len(images), batch_size):
                batch = torch.stack([self.transform(i) for i in images[start : start + batch_size]])
                features = self.encoder(batch.to(weight))  # its device and precision
                ids = self.decoder.sample(features, beam_size, max_len, **sampling)
                captions += map(self.text, ids)
        finally:
            self.train(was_training)
        return captions
