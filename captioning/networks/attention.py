"""An LSTM decoder with soft attention over the positions of a feature map.

    decoder = AttentionDecoder(embed_size=256, hidden_size=512, vocab_size=len(vocab))
    logits = decoder(memory, captions)                 # memory: (B, P, 2 * embed_size)
    logits, state, attention = decoder.step(tokens, state, memory)    # attention: (B, P)

Show, Attend and Tell (Xu et al., 2015, arXiv:1502.03044) computes the attention from the previous
state of the LSTM that it feeds, so that training has to run word by word. Here, as in Up-Down
(Anderson et al., 2018, arXiv:1707.07998), one LSTM attends and a second one predicts; but the first
does not read what was attended to. Under teacher forcing each LSTM therefore reads a whole caption
in one call, and the attention at all its words is one matrix product.
"""

import torch
from torch import nn

from captioning.base.tokens import PAD
from captioning.decoding import search as decoding
from captioning.networks.layers import Dropout, eval_mode

HIDDEN_RATIO = 2  # the attention LSTM is this many times as narrow as the language LSTM


class AttentionDecoder(nn.Module):
    """Two LSTMs with multi-head scaled dot-product attention (Vaswani et al., 2017) between them.

    At each step the attention LSTM reads the word and the mean value of the image; its output is
    the query. The language LSTM reads that output and the attended value. Its output and, through a
    linear layer, its input are projected to an embedding, whose products with the embeddings of all
    words are the logits of the next word: input and output share their embeddings (Press & Wolf,
    2017, arXiv:1608.05859).

    memory: (B, P, 2 * embed_size), for each of P positions its key and its value, each of size
        embed_size: what an `EncoderCNN` with `pooled=False` returns.

    Raises ValueError if num_heads does not divide embed_size.
    """

    def __init__(self, embed_size, hidden_size, vocab_size, dropout=0.0, num_heads=1):
        super().__init__()
        if embed_size % num_heads:
            raise ValueError(f"embed_size {embed_size} is not divisible by {num_heads} heads")
        self.embed_size, self.num_heads = embed_size, num_heads
        attention_size = hidden_size // HIDDEN_RATIO
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=PAD)
        self.attention_lstm = nn.LSTM(2 * embed_size, attention_size, batch_first=True)
        self.query = nn.Linear(attention_size, embed_size)
        self.language_lstm = nn.LSTM(attention_size + embed_size, hidden_size, batch_first=True)
        self.shortcut = nn.Linear(attention_size + embed_size, hidden_size)
        self.dropout = Dropout(dropout)
        self.projection = nn.Linear(hidden_size, embed_size)
        self.linear = nn.Linear(embed_size, vocab_size)
        self.linear.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=embed_size**-0.5)
        for lstm in (self.attention_lstm, self.language_lstm):
            size = lstm.hidden_size  # forget-gate bias 1 (Jozefowicz et al., 2015)
            nn.init.ones_(lstm.bias_ih_l0.data[size : 2 * size])

    def forward(self, memory, captions, positions=None, image_index=None):
        """Teacher forcing: (M, P, 2 * embed_size), (B, T) -> logits (B, T-1, vocab_size).

        image_index: (B,), the row of `memory` that belongs to each caption; None: the same row.
        positions: (N,) indices into the B * (T-1) predictions, as in `DecoderRNN`: then the logits
            are (N, vocab_size).
        """
        hidden, _, _ = self.hidden(captions[:, :-1], None, memory, image_index)
        if positions is not None:
            hidden = hidden.flatten(0, 1).index_select(0, positions)  # (N, hidden_size)
        return self.logits(hidden)

    def init_state(self, memory):
        """(B, P, 2 * embed_size) -> (h, c, h, c) of the two LSTMs, each (1, B, size): zeros."""
        return tuple(
            memory.new_zeros(1, len(memory), lstm.hidden_size)
            for lstm in (
                self.attention_lstm,
                self.attention_lstm,
                self.language_lstm,
                self.language_lstm,
            )
        )

    def step(self, tokens, state, memory):
        """One step of decoding: (B,), state, (B, P, 2 * embed_size) -> logits, state, attention.

        logits: (B, vocab_size) of the next word. attention: (B, P), the weights with which it is
        predicted, averaged over the heads.
        """
        hidden, state, attention = self.hidden(tokens.unsqueeze(1), state, memory)
        return self.logits(hidden.squeeze(1)), state, attention.squeeze(1)

    def logits(self, hidden):
        """(.., hidden_size) -> (.., vocab_size)."""
        return self.linear(self.projection(hidden))

    def sample(self, memory, beam_size=1, max_len=20, **options) -> decoding.Decoded:
        """Generate captions in eval mode; `options` are those of `decoding.generate`."""
        with eval_mode(self):
            return decoding.generate(self, memory, beam_size, max_len, **options)

    def hidden(self, tokens, state, memory, image_index=None):
        """(B, T) -> outputs (B, T, hidden_size), state, attention (B, T, P)."""
        first, second = (None, None) if state is None else (state[:2], state[2:])
        keys, values = memory.chunk(2, -1)  # (M, P, embed_size)
        mean, keys, values = values.mean(1), self.split_heads(keys), self.split_heads(values)
        if image_index is not None:
            mean, keys, values = (x.index_select(0, image_index) for x in (mean, keys, values))
        # Scaled like the other inputs: as weights of the logits the embeddings are small.
        words = self.dropout(self.embedding(tokens) * self.embed_size**0.5)  # (B, T, embed_size)
        mean = mean.unsqueeze(1).expand(-1, words.size(1), -1)
        queries, first = self.attention_lstm(torch.cat([words, mean], -1), first)
        attended, weights = self.attend(self.query(queries), keys, values)
        inputs = torch.cat([queries, attended], -1)
        outputs, second = self.language_lstm(inputs, second)
        return self.dropout(outputs + self.shortcut(inputs)), (*first, *second), weights.mean(1)

    def attend(self, queries, keys, values):
        """(B, T, embed_size), 2 x (B, heads, P, size) -> (B, T, embed_size), (B, heads, T, P).

        Written out, because `scaled_dot_product_attention` does not return the weights, and was
        measured to be several times slower than this on a CPU in bfloat16.
        """
        scores = self.split_heads(queries) @ keys.transpose(-1, -2)  # (B, heads, T, P)
        weights = (scores / keys.size(-1) ** 0.5).softmax(-1)
        return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2), weights

    def split_heads(self, x):
        """(B, L, embed_size) -> (B, heads, L, embed_size / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
