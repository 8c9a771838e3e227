"""User modules whose weights are shared, computed from others, or partly frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from .zoo import CLASSES, add

D = 4


class Model(nn.Module):
    """Parts, and what to do with them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module):
        super().__init__()
        self.function = forward
        self.parts = nn.ModuleDict(parts)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.function(*inputs, **dict(self.parts.items())))


def model(name: str, forward: Callable[..., Tensor], shape: tuple[int, ...] = (D,), **parts: Callable) -> None:
    """A case of vectors [N, D], or of samples of another shape."""
    add(
        name,
        lambda: Model(forward, **{key: build() for key, build in parts.items()}),
        lambda n: torch.randn(n, *shape),
    )


def linear() -> nn.Module:
    return nn.Linear(D, D)


# Weights that are used more than once
model("a layer called twice", lambda x, a: a(a(x).tanh()), a=linear)
model(
    "a layer called three times, on different lengths",
    lambda x, a: a(x[:, 0]) + a(x).sin().sum(1) * a(x[:, :2]).mean(1),
    (3, D),
    a=linear,
)
model("a layer called on the data twice", lambda x, a: a(x) * a(x.flip(-1)).sin(), a=linear)
model("a norm called twice", lambda x, n: n(n(x).sin()), n=lambda: nn.LayerNorm(D))
model("a convolution called twice", lambda x, c: c(c(x).sin()).sum(-1), (D, 5), c=lambda: nn.Conv1d(D, D, 3, padding=1))
model("a weight in a layer and elementwise", lambda x, a: a(x) * a.weight.diagonal() + a.weight.sum(), a=linear)
model("a weight and its transpose", lambda x, a: F.linear(a(x).tanh(), a.weight.t()), a=linear)
model("a weight on sequences and on vectors", lambda x, a: a(x).tanh().sum(1) + a(x.sum(1)), (3, D), a=linear)


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, D)
        self.output = nn.Linear(D, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.embedding(tokens).sum(1)))


add("tied embedding", TiedEmbedding, lambda n: torch.randint(6, (n, 5)))


# Reparametrisations
class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


class FromOneWeight(nn.Module):
    """A parametrization whose parameter belongs to more than one layer."""

    def __init__(self, scale: nn.Parameter):
        super().__init__()
        self.scale = scale

    def forward(self, w: Tensor) -> Tensor:
        return w * self.scale.exp()


def spectral() -> nn.Module:
    layer = parametrizations.spectral_norm(linear())
    layer.weight  # noqa: B018 (a step of the power iteration, while it is in training mode)
    return layer


def weight_normed_convolution() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv1d(D, D, 3))


def orthogonal() -> nn.Module:
    return parametrizations.orthogonal(linear(), orthogonal_map="cayley")


def symmetric() -> nn.Module:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class SharedScale(nn.Module):
    def __init__(self):
        super().__init__()
        scale = nn.Parameter(torch.randn(()))
        self.layers = nn.ModuleList(linear() for _ in range(2))
        for layer in self.layers:
            parametrize.register_parametrization(layer, "weight", FromOneWeight(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).tanh())


model("weight norm", lambda x, a: a(x).tanh().sum(1), (3, D), a=lambda: parametrizations.weight_norm(linear()))
model("weight norm of a convolution", lambda x, a: a(x).tanh().sum(-1), (D, 5), a=weight_normed_convolution)
model("spectral norm", lambda x, a: a(x).tanh(), a=spectral)
model("orthogonal weight", lambda x, a: a(x).tanh(), a=orthogonal)
model("symmetric weight, used twice", lambda x, a: a(a(x).tanh()), a=symmetric)
model("a parametrization of two layers", lambda x, a: a(x).tanh(), a=SharedScale)


class ParametrizationCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = parametrizations.weight_norm(linear())

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.layer(self.layer(x).tanh())


model("a parametrization that is cached", lambda x, a: a(x), a=ParametrizationCache)


class OldWeightNorm(nn.Module):
    """Weights that a hook of the module computes before every call."""

    def __init__(self):
        super().__init__()
        self.layer = linear()
        self.direction = nn.Parameter(torch.randn(D, D))
        del self.layer.weight
        self.layer.register_forward_pre_hook(self._compute)
        self.layer.weight = torch.zeros(D, D)

    def _compute(self, layer: nn.Module, inputs: object) -> None:
        layer.weight = self.direction / self.direction.norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


model("a weight computed by a hook", lambda x, a: a(x).tanh(), a=OldWeightNorm)


class LowRank(nn.Module):
    """A frozen layer with a trained update (LoRA)."""

    def __init__(self):
        super().__init__()
        self.frozen = linear().requires_grad_(False)
        self.down = nn.Linear(D, 2, bias=False)
        self.up = nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + 0.5 * self.up(self.down(x))


class BiasOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(D, D, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 3))
        for name, parameter in self.layers.named_parameters():
            parameter.requires_grad_("bias" in name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).tanh().sum(-1)


class FrozenBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.convolution, self.norm = linear(), nn.Conv1d(D, D, 3), nn.GroupNorm(2, D)
        for part in (self.layer, self.convolution, self.norm):
            part.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(self.layer(x).transpose(1, 2))).sin().sum(-1)


model("low-rank adaptation", lambda x, a: a(x).tanh().sum(1), (3, D), a=LowRank)
model("only biases trained", lambda x, a: a(x), (D, 5), a=BiasOnly)
model("biases frozen", lambda x, a: a(x), (5, D), a=FrozenBias)
