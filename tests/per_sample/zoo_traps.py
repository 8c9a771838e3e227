"""Models whose first batch looks simpler than the next: what was learned from it must not be believed of that one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .zoo import CLASSES, add
from .zoo_modules import D, linear, model
from .zoo_routes import Experts


class Ragged(nn.Module):
    """Rows of all samples one after another; each sample's are averaged."""

    def __init__(self, reduce: str):
        super().__init__()
        self.reduce = reduce
        self.layer, self.norm, self.head = linear(), nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        rows = self.norm(self.layer(rows)).sin()
        if self.reduce == "split":
            pooled = torch.stack([part.mean(0) for part in rows.split(lengths.tolist())])
        elif self.reduce == "slice":
            ends = lengths.cumsum(0).tolist()
            starts = [0, *ends[:-1]]
            pooled = torch.stack([rows[start:end].mean(0) for start, end in zip(starts, ends, strict=True)])
        elif self.reduce == "segment":
            pooled = torch.segment_reduce(rows, "mean", lengths=lengths)
        else:
            owner = torch.arange(len(lengths)).repeat_interleave(lengths)
            members = F.one_hot(owner, len(lengths)).to(rows.dtype).t()
            if self.reduce == "product":
                pooled = (members / lengths[:, None]) @ rows
            else:
                pooled = torch.sparse.mm(members.to_sparse(), rows) / lengths[:, None]
        return self.head(pooled)


def ragged(*lengths: int):
    return lambda n: (torch.randn(sum(lengths), D), torch.tensor(lengths))


def take_ragged(inputs: tuple[Tensor, Tensor], i: int) -> tuple[Tensor, Tensor]:
    rows, lengths = inputs
    return rows.split(lengths.tolist())[i], lengths[i : i + 1]


for reduce in ("split", "slice", "segment", "product", "sparse product"):
    add(
        f"rows of equal number, then not: {reduce}",
        lambda reduce=reduce: Ragged(reduce),
        ragged(2, 2, 2),
        later=ragged(1, 3, 2),
        take=take_ragged,
        sizes=(3, 3),
    )


class Adjacency(nn.Module):
    """Graphs as one block-diagonal matrix, and a matrix that averages each graph's nodes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList((linear(), linear()))
        self.head = nn.Linear(D, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor, pool: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = (edges @ layer(nodes)).tanh()
        return self.head(pool @ nodes)


def adjacency(*sizes: int):
    def inputs(n: int) -> tuple[Tensor, ...]:
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        same = (owner[:, None] == owner).double()
        pool = (owner == torch.arange(len(sizes))[:, None]).double() / torch.tensor(sizes)[:, None]
        return torch.randn(len(owner), D), torch.rand(len(owner), len(owner)) * same, pool

    return inputs


def take_nodes(inputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    nodes, edges, pool = inputs
    own = pool[i] > 0
    return nodes[own], edges[own][:, own], pool[i : i + 1, own]


add(
    "graphs of equal size, then not",
    Adjacency,
    adjacency(2, 2, 2, 2),
    later=adjacency(1, 4, 1, 2),
    take=take_nodes,
    sizes=(4, 4),
)


class Silenced(nn.Module):
    """Sequences [T, N, D] inside, and samples that a factor may silence; only the first position is read."""

    def __init__(self, samples_first: bool):
        super().__init__()
        self.samples_first = samples_first
        self.layer, self.head = linear(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.samples_first:
            return self.head(self.layer(x).tanh()[:, 0] * factor[:, None])
        return self.head(self.layer(x.transpose(0, 1)).tanh()[0] * factor[:, None])


def silenced(*alive: int, size: int = 6):
    def inputs(n: int) -> tuple[Tensor, Tensor]:
        factor = torch.zeros(size)
        factor[list(alive)] = 1
        return torch.randn(size, size, D), factor

    return inputs


for first in (True, False):
    order = "samples first" if first else "positions first"
    for alive in range(4):
        add(
            f"only sample {alive} has a gradient at first, {order}",
            lambda first=first: Silenced(first),
            silenced(alive),
            later=silenced(0, 1, 3, 4, 5),
            sizes=(6, 6),
        )


class Dispatched(Experts):
    """Experts with slots: matrices of zeros and ones bring positions to slots and back."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        gates, chosen = self.router(rows).softmax(-1).max(-1)
        choice = F.one_hot(chosen, 3)
        slot = (choice.cumsum(0) * choice).sum(-1) - 1
        dispatch = (choice[:, :, None] * F.one_hot(slot)[:, None]).to(rows.dtype)  # [rows, experts, slots]
        slots = torch.einsum("rec,rd->ecd", dispatch, rows)
        results = torch.stack([expert(own) for expert, own in zip(self.experts, slots, strict=True)])
        return torch.einsum("rec,ecd->rd", dispatch * gates[:, None, None], results).view_as(x)


class ConvolvedExperts(nn.Module):
    """Samples are sent to one of two convolutional networks."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv1d(D, D, 3), nn.GroupNorm(2, D), nn.PReLU(D), nn.Conv1d(D, D, 2)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), D)
        for own, expert in zip((x[:, 0, 0] > 0, x[:, 0, 0] <= 0), self.experts, strict=True):
            if own.any():
                out[own] = expert(x[own]).tanh().mean(-1)
        return out


class Transposes(nn.Module):
    """One square weight, used as it is and transposed, in ways that look alike in the graph."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ntd,de->nte", x, self.weight).tanh()
        z = torch.einsum("ntd,ed->nte", x, self.weight).sin()
        u = F.linear(x, self.weight.permute(1, 0)) * F.linear(x, self.weight.permute(0, 1))
        return (y + z + u).sum(1)


class Cube(nn.Module):
    """One parameter with three equal axes, turned in different ways."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, D))

    def forward(self, x: Tensor) -> Tensor:
        ways = [self.weight.permute(way).reshape(D, D * D) for way in ((0, 1, 2), (2, 0, 1), (1, 0, 2))]
        return sum(((x @ way).view(-1, D, D).sin().sum(1) for way in ways), start=torch.zeros(()))


class FoldedIn(nn.Module):
    """Positions and samples in one axis, either way round, and back."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = linear(), linear(), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        N, T, _ = x.shape
        y = self.first(x.reshape(N * T, D)).view(N, T, D).tanh()
        z = self.second(y.transpose(0, 1).reshape(T * N, D)).view(T, N, D)
        return self.norm(z).sum(0)


model("experts with slots", lambda x, a: a(x).sum(1), (5, D), a=Dispatched)
model("experts that are convolutions", lambda x, a: a(x), (D, 6), a=ConvolvedExperts)
model("a weight and its transpose in products that look alike", lambda x, a: a(x), (3, D), a=Transposes)
model("a parameter turned in three ways", lambda x, a: a(x), a=Cube)
model("positions and samples in one axis", lambda x, a: a(x), (5, D), a=FoldedIn)
model("positions and samples in one axis, as many of each", lambda x, a: a(x), (4, D), a=FoldedIn)
model("pairs of samples, stacked", lambda x, a: torch.cat([a(x), a(x.sin())]).tanh().view(2, -1, D).sum(0), a=linear)
model("twins in one batch", lambda x, a: a(torch.cat([x, x.sin()])).tanh().view(2, -1, D).prod(0), a=linear)
model("twins next to each other", lambda x, a: a(x.repeat_interleave(2, 0)).tanh().view(-1, 2, D).prod(1), a=linear)
model(
    "a sample in two halves",
    lambda x, a: a(torch.cat(x.split(2, 1)).flatten(1)).tanh().view(2, -1, D).prod(0),
    (4, D),
    a=lambda: nn.Linear(2 * D, D),
)
