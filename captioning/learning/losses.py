"""The training losses: teacher-forced cross-entropy, and the reward of sampled captions.

nll, tokens = TeacherForcing(model)(images, captions, lengths)
loss, tokens, rewards, samples = SelfCritical(model, reward)(images, captions, lengths, image_index)
"""

import torch
import torch.nn.functional as F
from torch import nn

from captioning.base.tokens import PAD, START
from captioning.decoding.search import mask_and_normalize, sample
from captioning.networks.layers import eval_mode

CHUNK_SIZE = 64  # captions per call of the decoder, in batches that are grouped by image


class TeacherForcing(nn.Module):
    """Negative log-likelihood of a batch of captions, given images and the preceding words.

    A module, so that DistributedDataParallel can wrap it. Computes in the model's precision.
    """

    def __init__(self, model, precomputed=False, label_smoothing=0.0):
        """precomputed: batches contain views of `features` instead of images (B, 3, H, W).

        label_smoothing: in training mode, the gradient is that of the cross-entropy with this much
            of a uniform distribution in the targets (Szegedy et al., 2016, arXiv:1512.00567). The
            value remains the negative log-likelihood.
        """
        super().__init__()
        self.model, self.precomputed = model, precomputed
        self.label_smoothing = label_smoothing

    def forward(self, images, captions, lengths=None, image_index=None):
        """The negative log-likelihood in nats, summed over the batch, and the number of targets.

        captions: (B, T) on the CPU, as a loader returns them. The targets are all words and
        `<end>`; the vocabulary projection and the loss are computed for these alone, not for
        padding. image_index: (B,), the row of `images` that belongs to each caption; None: the same
        row. With it, a batch contains captions of all lengths: after the images have been encoded,
        each once, it is processed in chunks of captions of similar length.
        lengths: (B,) of the captions; None: counted.
        """
        with self.model.autocast():
            memory = self.model.encode(to_device(images, self.model), self.precomputed)
            smoothing = self.label_smoothing if self.training else 0.0
            return cross_entropy(self.model, memory, captions, lengths, image_index, smoothing)


class SelfCritical(nn.Module):
    """Self-critical sequence training (Rennie et al., 2017, arXiv:1612.00563).

    The policy gradient of the expected reward of sampled captions. The baseline of a sample is the
    mean reward of the other samples of its image (Luo, 2020, arXiv:2003.09971). A module, like
    `TeacherForcing`. The dropout of `model` must be 0, so that the words' probabilities are those
    that they were sampled with.
    """

    def __init__(self, model, reward, precomputed=False, samples=5, xe_weight=0.0, max_len=20):
        """reward: a `rewards.CiderD`. samples: captions per image, at least 2. xe_weight: weight of
        the negative log-likelihood of the batch's own captions, which is added to the loss, also as
        a sum. max_len: of the samples.
        """
        super().__init__()
        self.model, self.reward, self.precomputed = model, reward, precomputed
        self.samples, self.xe_weight, self.max_len = samples, xe_weight, max_len

    def forward(self, images, captions, lengths, image_index):
        """(loss summed over the sampled tokens, their number, sum of the rewards, samples).

        A batch of a loader with `group_images`: images (B, 3, H, W) or their views, all
        captions of these images, their lengths, and the image of each caption.
        """
        with self.model.autocast():
            memory = self.model.encode(to_device(images, self.model), self.precomputed)
        sample_index = torch.arange(len(images)).repeat_interleave(self.samples)  # (S,)
        samples = self.sample(memory.detach().repeat_interleave(self.samples, 0))  # (S, L)
        arrays = (x.numpy() for x in (samples, sample_index, captions, image_index))
        rewards = torch.from_numpy(self.reward(*arrays))  # (S,)
        advantage = leave_one_out(rewards.view(-1, self.samples)).flatten()
        with self.model.autocast():
            log_probs, row = self.log_probs(memory, samples, sample_index)  # of N tokens
            loss = -(advantage[row].to(log_probs) * log_probs).sum()
            if self.xe_weight:
                nll, _ = cross_entropy(self.model, memory, captions, lengths, image_index)
                loss = loss + self.xe_weight * nll
        return loss, *loss.new_tensor([len(row), rewards.sum().item(), len(rewards)])

    def sample(self, memory):
        """A sampled caption for each row of `memory`: (S, L) token ids on the CPU.

        In an autocast context of its own: within one, older versions of PyTorch would use the
        weights that are converted here, which have no gradient, again for `log_probs`.
        """
        with eval_mode(self.model.decoder), self.model.autocast():
            return sample(self.model.decoder, memory, self.max_len).tokens.cpu()

    def log_probs(self, memory, samples, sample_index):
        """The log-probabilities (N,) of all words and `<end>` in `samples`, and the row of each.

        In the distribution that is sampled from, without `<pad>`, `<start>` and `<unk>`.
        """
        captions = F.pad(samples, (1, 0), value=START)
        values, rows = [], []
        for logits, targets, row in decode(self.model, memory, captions, image_index=sample_index):
            log_probs = mask_and_normalize(logits)
            values.append(log_probs.gather(1, targets.unsqueeze(1)).squeeze(1))
            rows.append(row)
        return torch.cat(values), torch.cat(rows)


def leave_one_out(rewards):
    """(B, S) rewards -> (B, S): each minus the mean of the other rewards of its row."""
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.size(1) - 1)


def cross_entropy(model, memory, captions, lengths=None, image_index=None, smoothing=0.0):
    """The loss of `TeacherForcing`, given the encoded images: (sum, number of targets)."""
    nll = tokens = 0
    for logits, targets, _ in decode(model, memory, captions, lengths, image_index):
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        if smoothing:  # the value without smoothing, the gradient with it
            loss = loss + (F.cross_entropy(logits, targets, reduction="sum") - loss).detach()
        nll, tokens = nll + loss, tokens + len(targets)
    return nll, nll.new_tensor(tokens)


def decode(model, memory, captions, lengths=None, image_index=None):
    """Teacher forcing: yields (logits (N, vocab_size), targets (N,), the caption (N,) of each).

    With image_index, in chunks of captions of similar length. `captions` and the last result are on
    the CPU, because nonzero() would synchronize a GPU.
    """
    rows = torch.arange(len(captions))
    if lengths is None:
        lengths = captions.ne(PAD).sum(1)
    chunks = [rows] if image_index is None else lengths.argsort().split(CHUNK_SIZE)
    for chunk in chunks:
        chunk_captions = captions[chunk, : lengths[chunk].max()]
        index = None if image_index is None else to_device(image_index[chunk], model)
        positions, targets = real_targets(chunk_captions)
        row = chunk[positions // (chunk_captions.size(1) - 1)]
        chunk_captions, positions, targets = (
            to_device(x, model) for x in (chunk_captions, positions, targets)
        )
        yield model.decoder(memory, chunk_captions, positions, index), targets, row


def to_device(tensor, model):
    return tensor.to(model.device, non_blocking=True)


def real_targets(captions):
    """(B, T) -> (positions (N,) among the B * (T-1) predictions, the targets (N,) there).

    `<start>` is never a target and `<pad>` is left out.
    """
    targets = captions[:, 1:].flatten()
    positions = targets.ne(PAD).nonzero().squeeze(1)
    return positions, targets[positions]
