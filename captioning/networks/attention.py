"""An LSTM decoder with soft attention over the positions of a feature map.

    decoder = AttentionDecoder(embed_size=256, hidden_size=512, vocab_size=len(vocab),
                               feature_size=2048)
    logits = decoder(features, captions)               # features: (B, P, 2048)
    logits, state, attention = decoder.step(tokens, state, memory)    # attention: (B, P)

Show, Attend and Tell (Xu et al., 2015, arXiv:1502.03044) computes the attention from the previous
state of the LSTM that it feeds, so that training has to run word by word. Here, as in Up-Down
(Anderson et al., 2018, arXiv:1707.07998), one LSTM attends and a second one predicts; but the first
does not read what was attended to. Under teacher forcing each LSTM therefore reads a whole caption
in one call, and the attention at all its words is one matrix product.
"""

import torch
from torch import nn

from captioning.base.modules import select
from captioning.base.tokens import PAD
from captioning.networks.decoder import Decoder, open_forget_gates, select_predictions

HIDDEN_RATIO = 2  # the attention LSTM is this many times as narrow as the language LSTM


class AttentionDecoder(Decoder):
    """Two LSTMs with multi-head scaled dot-product attention (Vaswani et al., 2017) between them.

    At each step the attention LSTM reads the word and the mean value of the image; its output is
    the query. The language LSTM reads that output and the attended value.
    Its output and, through a linear layer, its input are projected to an embedding, whose products
    with the embeddings of all words are the logits of the next word: input and output share their
    embeddings (Press & Wolf, 2017, arXiv:1608.05859).

    feature_size: C of the features (B, P, C), from which two linear layers compute the key and the
        value of each position.

    Raises ValueError if num_heads does not divide embed_size.
    """

    def __init__(self, embed_size, hidden_size, vocab_size, feature_size, dropout=0.0, num_heads=1):
        super().__init__()
        if embed_size % num_heads:
            raise ValueError(f"embed_size {embed_size} is not divisible by {num_heads} heads")
        self.embed_size, self.num_heads = embed_size, num_heads
        query_size = hidden_size // HIDDEN_RATIO
        self.keys = nn.Linear(feature_size, embed_size)
        self.values = nn.Linear(feature_size, embed_size)
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=PAD)
        self.attention_lstm = nn.LSTM(2 * embed_size, query_size, batch_first=True)
        self.query = nn.Linear(query_size, embed_size)
        self.language_lstm = nn.LSTM(query_size + embed_size, hidden_size, batch_first=True)
        self.shortcut = nn.Linear(query_size + embed_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(hidden_size, embed_size)
        self.linear = nn.Linear(embed_size, vocab_size)
        self.linear.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=embed_size**-0.5)
        open_forget_gates(self.attention_lstm)
        open_forget_gates(self.language_lstm)

    def memory(self, features):
        """(B, P, C) -> keys and values, each (B, heads, P, size), and the mean value (B, E)."""
        values = self.values(features)  # (B, P, E)
        keys = self.split_heads(self.keys(features))
        return keys, self.split_heads(values), values.mean(1)

    def predict(self, memory, captions, image_index=None, kept=None):
        """Teacher forcing, see `Decoder.predict`."""
        hidden, _, _ = self.run_lstms(captions[:, :-1], None, select(memory, image_index))
        return self.logits(select_predictions(hidden, kept))

    def init_state(self, memory):
        """(h, c, h, c) of the two LSTMs, each (1, B, size): zeros."""
        _, _, mean = memory
        sizes = self.attention_lstm.hidden_size, self.language_lstm.hidden_size
        return tuple(mean.new_zeros(1, len(mean), size) for size in sizes for _ in range(2))

    def step(self, tokens, state, memory):
        """One step of decoding: (B,), state, memory -> logits, state, attention.

        logits: (B, vocab_size) of the next word. attention: (B, P), the weights with which it is
        predicted, averaged over the heads.
        """
        hidden, state, attention = self.run_lstms(tokens.unsqueeze(1), state, memory)
        return self.logits(hidden.squeeze(1)), state, attention.squeeze(1)

    def logits(self, hidden):
        """(.., hidden_size) -> (.., vocab_size)."""
        return self.linear(self.projection(hidden))

    def run_lstms(self, tokens, state, memory):
        """(B, T) -> outputs (B, T, hidden_size), state, attention (B, T, P)."""
        keys, values, mean = memory
        first, second = (None, None) if state is None else (state[:2], state[2:])
        # Scaled like the other inputs: as weights of the logits the embeddings are small.
        words = self.dropout(self.embedding(tokens) * self.embed_size**0.5)  # (B, T, E)
        mean = mean.unsqueeze(1).expand(-1, words.size(1), -1)
        queries, first = self.attention_lstm(torch.cat([words, mean], -1), first)
        attended, weights = self.attend(self.query(queries), keys, values)
        inputs = torch.cat([queries, attended], -1)
        outputs, second = self.language_lstm(inputs, second)
        return self.dropout(outputs + self.shortcut(inputs)), (*first, *second), weights.mean(1)

    def attend(self, queries, keys, values):
        """(B, T, E), 2 x (B, heads, P, size) -> values (B, T, E), weights (B, heads, T, P).

        Written out, because `scaled_dot_product_attention` does not return the weights, and was
        measured to be several times slower than this on a CPU in bfloat16.
        """
        scores = self.split_heads(queries) @ keys.transpose(-1, -2)  # (B, heads, T, P)
        weights = (scores / keys.size(-1) ** 0.5).softmax(-1)
        return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2), weights

    def split_heads(self, x):
        """(B, L, E) -> (B, heads, L, E / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
