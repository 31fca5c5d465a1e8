"""The training losses: teacher-forced cross-entropy, and the reward of sampled captions.

sums = TeacherForcing(model)(batch)             # {"loss": .., "targets": ..}
sums = SelfCritical(model, reward)(batch)       # {"loss": .., "targets": .., "reward": .., ..}

A loss is a module that takes a batch and returns a dict of sums over the batch. Training adds them
up over the batches and the processes. "loss" is differentiated; its mean over the "targets" is the
training loss, and without a "reward", its exponential is printed as the training perplexity.
`train.build_loss` chooses the loss.
"""

import torch
import torch.nn.functional as F
from torch import nn

from captioning.base.modules import eval_mode, select
from captioning.base.tokens import START
from captioning.decoding.decoded import word_log_probs
from captioning.decoding.sampling import sample
from captioning.scoring.cross_entropy import batch_cross_entropy, cross_entropy, predictions


class TeacherForcing(nn.Module):
    """Negative log-likelihood of a batch of captions, given images and the preceding words.

    A module, so that DistributedDataParallel can wrap it. Computes in the model's precision.

    model: has `encode`, `decoder`, `autocast` and `device`, as `CaptionModel` and `Ensemble` do.
    label_smoothing: in training mode, the gradient is that of the cross-entropy with this much of a
        uniform distribution in the targets (Szegedy et al., 2016, arXiv:1512.00567). The value
        remains the negative log-likelihood.
    """

    def __init__(self, model, label_smoothing=0.0):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch):
        """{"loss": the negative log-likelihood in nats, summed; "targets": their number}.

        batch: a `data_loader.Batch` on the CPU, as a loader returns it. The targets are all words
        and `<end>`; the vocabulary projection and the loss are computed for these alone.
        """
        smoothing = self.label_smoothing if self.training else 0.0
        return batch_cross_entropy(self.model, batch, smoothing)


class SelfCritical(nn.Module):
    """Self-critical sequence training (Rennie et al., 2017, arXiv:1612.00563).

    The policy gradient of the expected reward of sampled captions. The baseline of a sample is the
    mean reward of the other samples of its image (Luo, 2020, arXiv:2003.09971). The dropout of
    `model` must be 0, so that the words' probabilities are those that they were sampled with.

    reward: a `CiderD`. samples: captions per image, at least 2. xe_weight: weight of the negative
        log-likelihood of the batch's own captions, which is added to the loss, also as a sum.
    """

    def __init__(self, model, reward, samples=5, xe_weight=0.0, max_len=20):
        super().__init__()
        self.model, self.reward, self.samples = model, reward, samples
        self.xe_weight, self.max_len = xe_weight, max_len

    def forward(self, batch):
        """{"loss": summed over the sampled tokens, "targets": their number, "reward": sum of the
        rewards, "samples": their number}.

        batch: images with all their captions, as with `get_loader(group_images=True)`.
        """
        images = int(batch.image_index.max()) + 1
        with self.model.autocast():
            memory = self.model.decoder.memory(self.model.encode(batch.images, batch.features))
        sample_index = torch.arange(images).repeat_interleave(self.samples)  # (S,)
        samples = self.sample(select(memory, self.to_device(sample_index)))  # (S, L)
        references = [[] for _ in range(images)]
        for row, caption in zip(batch.image_index.tolist(), batch.captions.tolist(), strict=True):
            references[row].append(caption)
        rewards = self.reward(samples.view(images, self.samples, -1).tolist(), references)
        rewards = torch.from_numpy(rewards)  # (images, samples)
        advantage = leave_one_out(rewards).flatten()
        with self.model.autocast():
            log_probs, row = self.log_probs(memory, samples, sample_index)  # of N tokens
            loss = -(self.to_device(advantage[row]).to(log_probs) * log_probs).sum()
            if self.xe_weight:
                own = cross_entropy(self.model, memory, batch.captions, batch.image_index)
                loss = loss + self.xe_weight * own["loss"]
        numbers = loss.new_tensor([len(row), rewards.sum().item(), rewards.numel()])
        return {"loss": loss, **dict(zip(("targets", "reward", "samples"), numbers, strict=True))}

    def to_device(self, tensor):
        return tensor.to(self.model.device)

    def sample(self, memory):
        """A sampled caption for each row of `memory`: (S, L) token ids on the CPU.

        In an autocast context of its own: within one, older versions of PyTorch would use the
        weights that are converted here, which have no gradient, again for `log_probs`.
        """
        with eval_mode(self.model.decoder), self.model.autocast():
            return sample(self.model.decoder, memory, self.max_len).tokens[:, 0].cpu()

    def log_probs(self, memory, samples, sample_index):
        """The log-probabilities (N,) of all words and `<end>` in `samples`, and the row of each.

        In the distribution that is sampled from, without `<pad>`, `<start>` and `<unk>`.
        """
        captions = F.pad(samples, (1, 0), value=START)
        values, rows = [], []
        for logits, targets, row in predictions(self.model, memory, captions, sample_index):
            log_probs = word_log_probs(logits).gather(1, targets.unsqueeze(1)).squeeze(1)
            values.append(log_probs[: len(row)])
            rows.append(row)
        return torch.cat(values), torch.cat(rows)


def leave_one_out(rewards):
    """(B, S) rewards -> (B, S): each minus the mean of the other rewards of its row."""
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.size(1) - 1)
