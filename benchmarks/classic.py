"""The classic captioning loop, small and plain: what bench.py measures this project against.

Tutorials train the same CNN + LSTM in these steps, and so does this file, which nothing but the
benchmark uses: every caption opens and resizes its photo anew, the CNN sees it in every training
step in float32, batches are random and their padding goes through the last layer into the loss,
the captions are tokenised at every start, and images are captioned one by one.

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

from model import build_backbone

PAD, START, END, UNK = 0, 1, 2, 3


def transform():
    """Path -> (3, 224, 224)."""
    return transforms.Compose([
        transforms.Lambda(open_image),
        transforms.Resize(256),
        transforms.RandomCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip


def open_image(path):
    return Image.open(path).convert("RGB")


def tokenise(captions, threshold=5):
    """(number of words, indices of every caption); the captions are split twice, as usual."""
    tokenizer = TreebankWordTokenizer()
    counts = Counter(word for text in captions for word in tokenizer.tokenize(text.lower()))
    words = [word for word, count in counts.items() if count >= threshold]
    index = {word: place for place, word in enumerate(words, start=4)}
    ids = []
    for text in captions:
        known = [index.get(word, UNK) for word in tokenizer.tokenize(text.lower())]
        ids.append([START, *known, END])
    return len(words) + 4, ids


class Decoder(nn.Module):
    """The image is the LSTM's first input and predicts `<start>`; layers are named as in model.py,
    so that either decoder can take the other's weights.
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
    """Training as it is usually written; `paths` and `captions` go by caption, not by image."""

    def __init__(self, paths, captions, backbone="resnet50", device="cpu", embed_size=512,
                 hidden_size=512, batch_size=64):  # fmt: skip
        self.paths, self.device, self.batch_size = paths, torch.device(device), batch_size
        vocab_size, self.ids = tokenise(captions)
        self.transform, self.rng = transform(), np.random.default_rng(0)
        # Frozen by its weights alone: in train mode BatchNorm still uses and updates statistics.
        self.cnn = build_backbone(backbone, None).requires_grad_(False).to(device).train()
        with torch.no_grad():
            image = torch.zeros(2, 3, 224, 224, device=device)
            feature_size = self.cnn(image).flatten(1).size(1)
        self.embed = nn.Linear(feature_size, embed_size).to(device)
        self.decoder = Decoder(embed_size, hidden_size, vocab_size).to(device)
        self.weights = [*self.embed.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, lr=1e-3)

    def load_images(self, places):
        return torch.stack([self.transform(self.paths[place]) for place in places])

    def encode(self, images):
        """(B, 3, 224, 224) -> (B, feature_size), in float32 and ordinary memory order."""
        return self.cnn(images.to(self.device)).flatten(1)

    def batch(self):
        """Random captions, padded to the longest: (B, 3, 224, 224), (B, T)."""
        places = self.rng.choice(len(self.ids), self.batch_size, replace=False)
        captions = [torch.tensor(self.ids[place]) for place in places]
        return self.load_images(places), nn.utils.rnn.pad_sequence(captions, batch_first=True)

    def step(self):
        """One step of training; returns the loss, which these loops print every time."""
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
    """The share of padding among the targets when captions are drawn at random."""
    order = np.random.default_rng(seed).permutation(lengths)
    batches = np.split(order, range(batch_size, len(order), batch_size))
    positions = sum(len(batch) * (batch.max() - 1) for batch in batches)
    return 1 - (order - 1).sum() / positions


# ---------------------------------------------------------------------------- decoding


def read(decoder, inputs, state):
    """One step of the LSTM: (k, embed_size) -> log-probabilities (k, vocab_size), new state."""
    hidden, state = decoder.lstm(inputs.unsqueeze(1), state)
    logits = decoder.linear(hidden[:, 0])
    logits[:, [PAD, START, UNK]] = -torch.inf  # as model.py does, so that both say the same
    return logits.log_softmax(-1), state


@torch.no_grad()
def greedy(decoder, feature, max_len=20):
    """The likeliest word after word for one image (1, embed_size)."""
    _, state = decoder.lstm(feature.unsqueeze(1))
    word, words = torch.tensor([START], device=feature.device), []
    for _ in range(max_len):
        scores, state = read(decoder, decoder.embedding(word), state)
        word = scores.argmax(1)
        if word.item() == END:
            break
        words.append(word.item())
    return words


@torch.no_grad()
def beam(decoder, feature, beam_size=3, max_len=20):
    """Beam search for one image (1, embed_size), each beam a Python list.

    The beam shrinks by one with each caption that ends; the best by mean log-probability wins.
    """
    _, state = decoder.lstm(feature.unsqueeze(1))
    beams, ended = [([START], 0.0, state)], []
    for _ in range(max_len):
        longer = []
        for words, score, state in beams:
            last = torch.tensor(words[-1:], device=feature.device)
            scores, state = read(decoder, decoder.embedding(last), state)
            for gain, word in zip(*(x.tolist() for x in scores[0].topk(beam_size)), strict=True):
                longer.append(([*words, word], score + gain, state))
        longer.sort(key=lambda item: -item[1])
        longer = longer[: beam_size - len(ended)]
        ended += [item for item in longer if item[0][-1] == END]
        beams = [item for item in longer if item[0][-1] != END]
        if not beams:
            break
    best = max(ended or beams, key=lambda item: item[1] / (len(item[0]) - 1))
    return [word for word in best[0][1:] if word != END]
