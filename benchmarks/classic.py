"""The classic captioning loop, small and plain: what bench.py compares this project with.

Tutorials train the same CNN and LSTM in these steps, and so does this file: every caption opens and
resizes its image again, every training step runs the CNN in float32, batches are random and the
vocabulary projection and the loss include their padding, and images are captioned one by one.

    python benchmarks/classic.py training data scratch     # see rounds.serve
"""

import itertools
import json
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from nltk.tokenize import TreebankWordTokenizer
from PIL import Image
from random_data import end_at_length
from rounds import serve
from torch import nn
from torchvision import models, transforms

PAD, START, END, UNK = range(4)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH_SIZE, FEATURE_SIZE, EMBED_SIZE, HIDDEN_SIZE = 64, 2048, 256, 512
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = transforms.Resize(256), transforms.RandomCrop(224), transforms.ToTensor()
TRANSFORM = transforms.Compose([*STEPS, transforms.Normalize(*STATISTICS)])


def read(data):
    """(the image file of every caption, the captions)."""
    content = json.loads((data / "train.json").read_text())
    files = {image["id"]: data / "images" / image["file_name"] for image in content["images"]}
    paths = [files[caption["image_id"]] for caption in content["annotations"]]
    return paths, [caption["caption"] for caption in content["annotations"]]


def tokenize(captions, threshold=5):
    """(number of words, indices of every caption)."""
    tokenized = [TreebankWordTokenizer().tokenize(text.lower()) for text in captions]
    counts = Counter(word for caption in tokenized for word in caption)
    words = [word for word, count in counts.items() if count >= threshold]
    index = {word: i for i, word in enumerate(words, start=4)}
    ids = [[index.get(word, UNK) for word in caption] for caption in tokenized]
    return len(words) + 4, [torch.tensor([START, *known, END]) for known in ids]


def load(path):
    return TRANSFORM(Image.open(path).convert("RGB"))


def build_cnn():
    """Only the weights are frozen: in train mode BatchNorm uses and updates batch statistics."""
    cnn = models.resnet50()
    cnn.fc = nn.Identity()
    return cnn.requires_grad_(False).to(DEVICE).train()


class Decoder(nn.Module):
    """The image is the LSTM's first input and predicts `<start>`."""

    def __init__(self, vocab_size):
        super().__init__()
        self.image = nn.Linear(FEATURE_SIZE, EMBED_SIZE)
        self.embedding = nn.Embedding(vocab_size, EMBED_SIZE)
        self.lstm = nn.LSTM(EMBED_SIZE, HIDDEN_SIZE, batch_first=True)
        self.linear = nn.Linear(HIDDEN_SIZE, vocab_size)

    def forward(self, features, captions):
        """(B, FEATURE_SIZE), (B, T) -> logits (B, T, vocab_size) for `captions`."""
        words = self.embedding(captions[:, :-1])  # (B, T-1, EMBED_SIZE)
        hidden, _ = self.lstm(torch.cat([self.image(features).unsqueeze(1), words], dim=1))
        return self.linear(hidden)

    def step(self, inputs, state):
        """(1, EMBED_SIZE) -> log-probabilities (1, vocab_size), new state."""
        hidden, state = self.lstm(inputs.unsqueeze(1), state)
        logits = self.linear(hidden[:, 0])
        logits[:, [PAD, START, UNK]] = -torch.inf
        return logits.log_softmax(-1), state


@torch.no_grad()
def beam_search(decoder, feature, beam_size=3, max_len=20):
    """Beam search for one image (1, FEATURE_SIZE), with Python lists.

    The beam shrinks by one with each caption that ends; the one with the highest mean
    log-probability is returned.
    """
    _, state = decoder.lstm(decoder.image(feature).unsqueeze(1))
    beams, ended = [([START], 0.0, state)], []
    for _ in range(max_len):
        longer = []
        for words, score, state in beams:
            last = torch.tensor(words[-1:], device=DEVICE)
            log_probs, new_state = decoder.step(decoder.embedding(last), state)
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


# ---------------------------------------------------------------------------- stages


def images(data, scratch):
    for path in itertools.cycle(read(data)[0]):
        load(path)
        yield 1


def extraction(data, scratch):
    """The CNN alone, for a training loop with cached features."""
    paths, cnn = itertools.cycle(read(data)[0]), build_cnn()
    while True:
        batch = torch.stack([load(path) for path in itertools.islice(paths, BATCH_SIZE)])
        cnn(batch.to(DEVICE)).cpu()
        yield len(batch)


def training(cached, data, scratch):
    """cached: from features in memory, without opening and encoding images."""
    paths, captions = read(data)
    vocab_size, ids = tokenize(captions)
    cnn, decoder, rng = build_cnn(), Decoder(vocab_size).to(DEVICE), np.random.default_rng(0)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3)
    features = torch.randn(BATCH_SIZE, FEATURE_SIZE, device=DEVICE)
    while True:
        rows = rng.choice(len(ids), BATCH_SIZE, replace=False)
        batch = nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True).to(DEVICE)
        if not cached:
            features = cnn(torch.stack([load(paths[row]) for row in rows]).to(DEVICE))
        loss = F.cross_entropy(decoder(features, batch).flatten(0, 1), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
        optimizer.step()
        loss.item()  # which such loops print in every step
        yield BATCH_SIZE


def captioning(data, scratch):
    decoder = Decoder(tokenize(read(data)[1])[0]).to(DEVICE).eval()
    end_at_length(decoder, END)
    while True:
        beam_search(decoder, torch.randn(1, FEATURE_SIZE, device=DEVICE))
        yield 1


STAGES = {
    "images": images,
    "extraction": extraction,
    "training": partial(training, False),
    "training-cached": partial(training, True),
    "captioning": captioning,
}

if __name__ == "__main__":
    serve(STAGES)
