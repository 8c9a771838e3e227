"""User modules that send samples different ways, hide what they compute from autograd, or batch them unevenly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from .zoo import CLASSES, add
from .zoo_modules import D, linear, model


# Samples that go different ways
class Experts(nn.Module):
    """Every position goes to one expert, which sees the rows that came to it and no others."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 5), nn.GELU(), nn.Linear(5, D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        gates, chosen = self.router(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            own = (chosen == index).nonzero().squeeze(1)
            out = out.index_add(0, own, expert(rows[own]) * gates[own, None])
        return out.view_as(x)


class TwoExperts(Experts):
    """Every position goes to two experts: rows are repeated, sorted by expert and summed up again."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        gates, chosen = self.router(rows).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=3).tolist()
        parts = rows[order // 2].split(counts)
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(rows).index_add(0, order // 2, results * gates.flatten()[order, None]).view_as(x)


class Branches(nn.Module):
    """Which layer a sample passes is decided by its data; a batch may miss one of them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        goes_left = x[:, 0] > 0.3
        if goes_left.any():
            out[goes_left] = self.left(x[goes_left])
        if (~goes_left).any():
            out[~goes_left] = self.right(x[~goes_left]).tanh()
        return out


class Hyper(nn.Module):
    """The weights of a layer are another layer's output, so that every sample has its own."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Linear(D, D * D)
        self.base = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        own = self.weights(x).view(-1, D, D) + self.base
        return torch.bmm(own, x[:, :, None]).squeeze(-1).tanh()


class Ensemble(nn.Module):
    """Members whose weights are stacked, run under vmap."""

    def __init__(self):
        super().__init__()
        members = [linear() for _ in range(3)]
        stacked, _ = stack_module_state(members)
        self.weight, self.bias = nn.Parameter(stacked["weight"].detach()), nn.Parameter(stacked["bias"].detach())
        self.skeleton = [members[0].requires_grad_(False)]  # in a list: no submodule

    def forward(self, x: Tensor) -> Tensor:
        def member(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.skeleton[0], state, (x,))

        return vmap(member, (0, None))({"weight": self.weight, "bias": self.bias}, x).tanh().mean(0)


class Functional(nn.Module):
    """A layer that is called with weights made of its own."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        state = {name: 2 * p for name, p in self.layer.named_parameters()}
        return functional_call(self.layer, state, (x,)).tanh()


class Force(nn.Module):
    """The derivative of an energy in the positions: the graph is that of a backward pass."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


model("experts of vectors", lambda x, a: a(x), a=Experts)
model("experts of positions", lambda x, a: a(x).sum(1), (5, D), a=Experts)
model("two experts a position", lambda x, a: a(x).sum(1), (5, D), a=TwoExperts)
model("samples that branch", lambda x, a: a(x), a=Branches)
model("weights of every sample's own", lambda x, a: a(x), a=Hyper)
model("ensemble under vmap", lambda x, a: a(x), a=Ensemble)
model("ensemble of sequences under vmap", lambda x, a: a(x).sum(1), (3, D), a=Ensemble)
model("functional call", lambda x, a: a(x), a=Functional)
model("forces of a learned energy", lambda x, a: a(x), a=Force)


# What is recomputed, cut off, or written by hand
class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(linear(), nn.Tanh(), nn.LayerNorm(D), linear())

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.layers, x, use_reentrant=False)


class Affine(torch.autograd.Function):
    """x * scale + shift, with a backward of its own."""

    @staticmethod
    def forward(ctx, x, scale, shift):
        ctx.save_for_backward(x, scale)
        return x * scale + shift

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)


class Matrix(torch.autograd.Function):
    """x @ w.T, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, torch.einsum("...o,...i->oi", grad, x)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return Matrix.apply(Affine.apply(x, self.scale, self.shift).tanh(), self.weight)


model("checkpointed layers", lambda x, a: a(x).tanh(), a=Checkpointed)
model("checkpointed layers of sequences, twice", lambda x, a: a(a(x)).tanh().sum(1), (3, D), a=Checkpointed)
model("own autograd Functions", lambda x, a: a(x).tanh(), a=ByHand)
model("own autograd Functions on sequences", lambda x, a: a(x).tanh().sum(1), (3, D), a=ByHand)
model("gradients cut off on one way", lambda x, a, b: a(x).detach() * b(x) + a(x.sin()), a=linear, b=linear)
model("an output that no data reach", lambda x, a: a(torch.ones_like(x)), a=linear)


class Constant(nn.Module):
    """Logits that are the parameter itself, whatever the sample."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), CLASSES)


class Graphs(nn.Module):
    """Nodes of all graphs in one tensor; edges and the graph of each node as indices."""

    def __init__(self):
        super().__init__()
        self.message, self.update, self.norm = linear(), linear(), nn.LayerNorm(D)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, count: Tensor) -> Tensor:
        for _ in range(2):
            messages = self.message(nodes[edges[0]]).relu()
            nodes = self.norm(self.update(nodes).index_add(0, edges[1], messages))
        return self.head(nodes.new_zeros(len(count), D).index_add(0, graph, nodes))


def graphs(n: int) -> tuple[Tensor, ...]:
    sizes = torch.tensor([2, 4, 1, 3])[:n]
    starts = sizes.cumsum(0) - sizes
    graph = torch.arange(n).repeat_interleave(sizes)
    own = graph.repeat(2)  # two edges begin at each node, and end somewhere in its graph
    ends = starts[own] + (torch.rand(len(own)) * sizes[own]).long()
    return torch.randn(len(graph), D), torch.stack([torch.arange(len(graph)).repeat(2), ends]), graph, torch.zeros(n)


def take_graph(inputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    nodes, edges, graph, _ = inputs
    own = (graph == i).nonzero().squeeze(1)
    return nodes[own], edges[:, graph[edges[0]] == i] - own[0], torch.zeros_like(own), torch.zeros(1)


add("logits that are a parameter", Constant, lambda n: torch.randn(n, D))
add("graphs", Graphs, graphs, take=take_graph)
