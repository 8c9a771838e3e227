"""Attention, transformers and recurrent networks, with samples first and with positions first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .zoo import CLASSES, add, token_cross_entropy

WIDTH, LENGTH, VOCABULARY = 4, 5, 7


class Sequences(nn.Module):
    """A body over sequences [N, T, WIDTH], or [T, N, WIDTH] for one with positions first; then the mean position."""

    def __init__(self, body: nn.Module, samples_first: bool = True, outputs: int = WIDTH):
        super().__init__()
        self.samples_first = samples_first
        self.before = nn.Linear(WIDTH, WIDTH)
        self.body = body
        self.head = nn.Linear(outputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if not self.samples_first:
            x = x.transpose(0, 1)
        x = self.body(self.before(x))
        x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(1 if self.samples_first else 0))


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        nn.init.normal_(self.attention.in_proj_bias)  # zero otherwise
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Causal(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=True)[0]


class Cross(nn.Module):
    """Queries of one width attend to keys and values of others."""

    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=3, vdim=6, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if not self.batch_first:
            x, keys, values = (y.transpose(0, 1) for y in (x, keys, values))
        return self.head(self.attention(x, keys, values)[0].mean(1 if self.batch_first else 0))


class Padded(nn.Module):
    """Attention that leaves out padding, which is somewhere else in every sample."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        padding = tokens == 0
        x = self.attention(x, x, x, key_padding_mask=padding)[0]
        return self.head(x.masked_fill(padding[:, :, None], 0).sum(1))


class EncoderDecoder(nn.Module):
    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.batch_first = batch_first
        options = dict(dim_feedforward=6, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, norm_first=True, **options)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 2, activation="gelu", **options)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        if not self.batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=source.dtype)
        x = self.decoder(target, self.encoder(source), tgt_mask=mask)
        return self.head(x.mean(1 if self.batch_first else 0))


class Packed(nn.Module):
    """A recurrent network over sequences of different lengths, packed."""

    def __init__(self, network: nn.Module, features: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, lengths = pad_packed_sequence(self.network(packed)[0], batch_first=True)
        return self.head(outputs[torch.arange(len(x)), lengths - 1])


class Cells(nn.Module):
    """A cell that is called once a position, as often as the sequence is long."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class LastState(nn.Module):
    """The hidden state of every layer, which is [layers, N, H], rather than the outputs."""

    def __init__(self):
        super().__init__()
        self.network = nn.GRU(WIDTH, 3, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x)[1].transpose(0, 1).flatten(1))


class Language(nn.Module):
    """A causal language model, [N, T] tokens to [N, T, V], its output tied to its embedding."""

    def __init__(self, samples_first: bool = True):
        super().__init__()
        self.samples_first = samples_first
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(9, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=samples_first)
        self.output = nn.Linear(WIDTH, VOCABULARY)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding(tokens) + self.position[:T]
        mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype)
        if self.samples_first:
            return self.output(self.layer(x, src_mask=mask))
        return self.output(self.layer(x.transpose(0, 1), src_mask=mask)).transpose(0, 1)


def sequences(name: str, build: Callable[[], nn.Module], length: int = LENGTH, **options) -> None:
    add(name, build, lambda n: torch.randn(n, length, WIDTH), **options)


def language(name: str, samples_first: bool, length: int = LENGTH, **options) -> None:
    add(
        name,
        lambda: Language(samples_first),
        lambda n: torch.randint(VOCABULARY, (n, length)),
        targets=lambda n: torch.randint(VOCABULARY, (n, length)),
        loss=token_cross_entropy,
        **options,
    )


for first in (True, False):
    order = "samples first" if first else "positions first"
    sequences(
        f"attention, {order}", lambda first=first: Sequences(SelfAttention(batch_first=first), samples_first=first)
    )
    add(
        f"cross attention, {order}",
        lambda first=first: Cross(first),
        lambda n: (torch.randn(n, 2, WIDTH), torch.randn(n, 3, 3), torch.randn(n, 3, 6)),
    )
    add(
        f"encoder and decoder, {order}",
        lambda first=first: EncoderDecoder(first),
        lambda n: (torch.randn(n, 3, WIDTH), torch.randn(n, LENGTH, WIDTH)),
    )
    sequences(
        f"encoder of two layers, {order}",
        lambda first=first: Sequences(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=first), 2, enable_nested_tensor=False
            ),
            samples_first=first,
        ),
    )
    # As many positions as samples: which axis is which cannot be read off the shapes.
    sequences(
        f"encoder with as many positions as samples, {order}",
        lambda first=first: Sequences(nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=first), samples_first=first),
        length=LENGTH,
        sizes=(LENGTH, 3, LENGTH),
    )
    sequences(
        f"recurrent network with as many positions as samples, {order}",
        lambda first=first: Sequences(nn.LSTM(WIDTH, WIDTH, batch_first=first), samples_first=first),
        length=LENGTH,
        sizes=(LENGTH, 2),
    )
    sequences(
        f"everything of one size, {order}",
        lambda first=first: Sequences(nn.TransformerEncoderLayer(WIDTH, 2, 4, batch_first=first), samples_first=first),
        length=WIDTH,
        sizes=(WIDTH, 2),
    )
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        sequences(
            f"{kind.__name__}, {order}",
            lambda kind=kind, first=first: Sequences(kind(WIDTH, WIDTH, batch_first=first), samples_first=first),
        )
    language(f"language model, {order}", first)
    language(f"language model with as many positions as samples, {order}", first, sizes=(LENGTH, 2))

sequences("causal attention", lambda: Sequences(Causal(batch_first=True)))
sequences(
    "attention with biases for key and value", lambda: Sequences(SelfAttention(batch_first=True, add_bias_kv=True))
)
add(
    "attention with padding",
    Padded,
    lambda n: torch.randint(1, VOCABULARY, (n, LENGTH)) * (torch.arange(LENGTH) < torch.arange(2, n + 2)[:, None]),
)
for kind in (nn.RNN, nn.LSTM, nn.GRU):
    sequences(
        f"{kind.__name__} of two layers, both ways",
        lambda kind=kind: Sequences(
            kind(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2), outputs=6
        ),
    )
    add(
        f"{kind.__name__}, packed",
        lambda kind=kind: Packed(kind(WIDTH, 3, batch_first=True), 3),
        lambda n: (torch.randn(n, LENGTH, WIDTH), torch.tensor([2, 5, 1, 4, 3])[:n]),
    )
    cell = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}[kind]
    sequences(f"{cell.__name__}", lambda cell=cell: Cells(cell(WIDTH, WIDTH)))
sequences("LSTM with projection", lambda: Sequences(nn.LSTM(WIDTH, 4, proj_size=3, batch_first=True), outputs=3))
sequences("GRU without bias", lambda: Sequences(nn.GRU(WIDTH, 3, bias=False, batch_first=True), outputs=3))
sequences("last states of a GRU", LastState)
add(
    "two layers, both ways, packed",
    lambda: Packed(nn.LSTM(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True), 6),
    lambda n: (torch.randn(n, LENGTH, WIDTH), torch.tensor([2, 5, 1, 4, 3])[:n]),
    sizes=(3, 2),
)
