"""The classic captioning loop, small and plain: what bench.py compares this project with.

Tutorials train the same CNN and LSTM in these steps, and so does this file, which only the
benchmark uses: every caption opens and resizes its image again, every training step runs the CNN in
float32, batches are random and the vocabulary projection and the loss include their padding, the
captions are tokenized at every start, and images are captioned one by one.

    loop = ClassicLoop(paths, captions, backbone="resnet50", device="cpu")
    loop.step()                                          # 64 captions
    greedy(loop.decoder, feature), beam(loop.decoder, feature, 3)
"""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from nltk.tokenize import TreebankWordTokenizer
from PIL import Image
from torch import nn
from torchvision import transforms

from captioning.networks.backbones import build_backbone
from vocabulary import END, PAD, START, UNK


def transform():
    """Path -> (3, 224, 224)."""
    return transforms.Compose(
        [
            transforms.Lambda(open_image),
            transforms.Resize(256),
            transforms.RandomCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def open_image(path):
    return Image.open(path).convert("RGB")


def tokenize(captions, threshold=5):
    """(number of words, indices of every caption); the captions are tokenized twice, as usual."""
    tokenizer = TreebankWordTokenizer()
    counts = Counter(word for text in captions for word in tokenizer.tokenize(text.lower()))
    words = [word for word, count in counts.items() if count >= threshold]
    index = {word: i for i, word in enumerate(words, start=4)}
    ids = []
    for text in captions:
        known = [index.get(word, UNK) for word in tokenizer.tokenize(text.lower())]
        ids.append([START, *known, END])
    return len(words) + 4, ids


class Decoder(nn.Module):
    """The image is the LSTM's first input and predicts `<start>`. Layers are named as in model.py,
    so that each decoder can load the other's weights.
    """

    def __init__(self, embed_size, hidden_size, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)

    def forward(self, features, captions):
        """(B, embed_size), (B, T) -> logits (B, T, vocab_size) for `captions`."""
        words = self.embedding(captions[:, :-1])  # (B, T-1, embed_size)
        hidden, _ = self.lstm(torch.cat([features.unsqueeze(1), words], dim=1))
        return self.linear(hidden)


class ClassicLoop:
    """Training as it is usually written; `paths` and `captions` have one entry per caption."""

    def __init__(
        self,
        paths,
        captions,
        backbone="resnet50",
        device="cpu",
        embed_size=512,
        hidden_size=512,
        batch_size=64,
    ):
        self.paths, self.device, self.batch_size = paths, torch.device(device), batch_size
        vocab_size, self.ids = tokenize(captions)
        self.transform, self.rng = transform(), np.random.default_rng(0)
        # Only the weights are frozen: in train mode BatchNorm uses and updates batch statistics.
        self.cnn = build_backbone(backbone, None).requires_grad_(False).to(device).train()
        with torch.no_grad():
            image = torch.zeros(2, 3, 224, 224, device=device)
            feature_size = self.cnn(image).flatten(1).size(1)
        self.embed = nn.Linear(feature_size, embed_size).to(device)
        self.decoder = Decoder(embed_size, hidden_size, vocab_size).to(device)
        self.weights = [*self.embed.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, lr=1e-3)

    def load_images(self, indices):
        return torch.stack([self.transform(self.paths[index]) for index in indices])

    def encode(self, images):
        """(B, 3, 224, 224) -> (B, feature_size), in float32 and the default memory format."""
        return self.cnn(images.to(self.device)).flatten(1)

    def batch(self):
        """Random captions, padded to the longest: (B, 3, 224, 224), (B, T)."""
        indices = self.rng.choice(len(self.ids), self.batch_size, replace=False)
        captions = [torch.tensor(self.ids[index]) for index in indices]
        return self.load_images(indices), nn.utils.rnn.pad_sequence(captions, batch_first=True)

    def step(self):
        """One training step; returns the loss, which these loops print in every step."""
        images, captions = self.batch()
        captions = captions.to(self.device)
        logits = self.decoder(self.embed(self.encode(images)), captions)
        loss = F.cross_entropy(logits.flatten(0, 1), captions.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0)
        self.optimizer.step()
        return loss.item()


def padding(lengths, batch_size=64, seed=0):
    """The fraction of padding among the targets of randomly composed batches."""
    order = np.random.default_rng(seed).permutation(lengths)
    batches = np.split(order, range(batch_size, len(order), batch_size))
    positions = sum(len(batch) * (batch.max() - 1) for batch in batches)
    return 1 - (order - 1).sum() / positions


# ---------------------------------------------------------------------------- decoding


def step(decoder, inputs, state):
    """One step of the LSTM: (k, embed_size) -> log-probabilities (k, vocab_size), new state."""
    hidden, state = decoder.lstm(inputs.unsqueeze(1), state)
    logits = decoder.linear(hidden[:, 0])
    logits[:, [PAD, START, UNK]] = -torch.inf  # as in decoding.py
    return logits.log_softmax(-1), state


@torch.no_grad()
def greedy(decoder, feature, max_len=20):
    """The most probable word at each step, for one image (1, embed_size)."""
    _, state = decoder.lstm(feature.unsqueeze(1))
    word, words = torch.tensor([START], device=feature.device), []
    for _ in range(max_len):
        log_probs, state = step(decoder, decoder.embedding(word), state)
        word = log_probs.argmax(1)
        if word.item() == END:
            break
        words.append(word.item())
    return words


@torch.no_grad()
def beam(decoder, feature, beam_size=3, max_len=20):
    """Beam search for one image (1, embed_size), with Python lists.

    The beam shrinks by one with each caption that ends; the one with the highest mean
    log-probability is returned.
    """
    _, state = decoder.lstm(feature.unsqueeze(1))
    beams, ended = [([START], 0.0, state)], []
    for _ in range(max_len):
        longer = []
        for words, score, state in beams:
            last = torch.tensor(words[-1:], device=feature.device)
            log_probs, new_state = step(decoder, decoder.embedding(last), state)
            values, indices = log_probs[0].topk(beam_size)
            for value, word in zip(values.tolist(), indices.tolist(), strict=True):
                longer.append(([*words, word], score + value, new_state))
        longer.sort(key=lambda item: -item[1])
        longer = longer[: beam_size - len(ended)]
        ended += [item for item in longer if item[0][-1] == END]
        beams = [item for item in longer if item[0][-1] != END]
        if not beams:
            break
    best = max(ended or beams, key=lambda item: item[1] / (len(item[0]) - 1))
    return [word for word in best[0][1:] if word != END]
