"""The four models that per-sample quantities are measured on, and the plain training step that they are measured in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, VOCABULARY, POSITIONS, WIDTH = 10, 1000, 64, 256


class Problem(NamedTuple):
    """A model in training mode and one batch (inputs, targets)."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def conv_net() -> nn.Module:
    """3 x 32 x 32 through 32, 64 and 128 channels, halved after each."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, CLASSES))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, normalised by groups (He et al., 2016, for CIFAR)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H / stride, W / stride]."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def resnet8() -> nn.Module:
    """One block a stage of 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


class Positions(nn.Module):
    """Learned positions, added; a module of its own because opacus wants every parameter in a leaf."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, d] -> the same."""
        return x + self.weight


class Transformer(nn.Module):
    """Tokens [N, T] to one of ten classes: four encoder layers, normalised first, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = Positions(POSITIONS, WIDTH)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(WIDTH, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(4)
            )
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] int64 -> [N, 10]."""
        return self.head(self.layers(self.positions(self.tokens(tokens))).mean(1))


def _images(N: int) -> Tensor:
    return torch.randn(N, 3, 32, 32)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "mlp": (mlp, lambda N: torch.randn(N, 784), 256),
    "conv": (conv_net, _images, 64),
    "resnet8": (resnet8, _images, 32),
    "transformer": (Transformer, lambda N: torch.randint(VOCABULARY, (N, POSITIONS)), 32),
}
"""Name -> (model, inputs of N samples, N of the benchmark)."""


def make(name: str, N: int | None = None) -> Problem:
    """A model with fresh parameters, and N samples (the benchmark's number if None); the same at every call."""
    torch.manual_seed(0)
    build, inputs, size = MODELS[name]
    N = N or size
    return Problem(build().train(), (inputs(N), torch.randint(CLASSES, (N,))))


def plain_step(problem: Problem) -> None:
    """What everything is measured in: forward, mean cross-entropy, backward, into fresh gradients."""
    model, (inputs, targets) = problem
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(inputs), targets).backward()
