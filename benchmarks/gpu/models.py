"""The models whose training steps are measured: an MLP, ResNet-18 normalised by groups, GPT-2 small's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scale import Scale


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., 2016), normalised by groups (Wu and He, 2018)."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, c_out)
        changes = stride != 1 or c_in != c_out
        shortcut = (nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.GroupNorm(groups, c_out))
        self.shortcut = nn.Sequential(*shortcut) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H / stride, W / stride]."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def resnet18(width: int, classes: int, groups: int) -> nn.Module:
    """Four stages of two blocks, `width` channels in the first and twice as many in each that follows."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(groups, width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    ]
    c_in = width
    for stage in range(4):
        c_out = width * 2**stage
        layers += [Block(c_in, c_out, 1 if stage == 0 else 2, groups), Block(c_out, c_out, 1, groups)]
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


class Layer(nn.Module):
    """Causal attention and a perceptron, normalised first (Radford et al., 2019)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, d] -> the same."""
        N, T, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, T, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(N, T, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    """Tokens to the next token's logits; the head has the embedding's weight."""

    def __init__(self, vocabulary: int, positions: int, width: int, heads: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N, T, vocabulary]."""
        x = self.norm(self.layers(self.tokens(tokens) + self.positions))
        return F.linear(x, self.tokens.weight)


def mean_over_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sequence: [N, T, V], [N, T] -> [N]."""
    rows = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return rows.view(targets.shape).mean(1)


def of_each_row(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample: [N, V], [N] -> [N]."""
    return F.cross_entropy(outputs, targets, reduction="none")


class Training(NamedTuple):
    """A model on its device, batches for it, and the loss of each sample."""

    model: nn.Module
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    shape: str


def mlp(scale: Scale) -> Training:
    """784-2048-2048-10."""
    N, width = (8, 16) if scale.tiny else (4096, 2048)
    with torch.device(scale.device):
        layers = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        model = nn.Sequential(*layers)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(N, 784, device=scale.device), torch.randint(10, (N,), device=scale.device)

    return Training(model, batch, of_each_row, f"784-{width}-{width}-10, N {N}")


def resnet(scale: Scale) -> Training:
    """Images of 224 x 224 in 1,000 classes."""
    N, side, width, classes, groups = (2, 32, 8, 10, 4) if scale.tiny else (64, 224, 64, 1000, 32)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(N, 3, side, side, device=scale.device), torch.randint(classes, (N,), device=scale.device)

    with torch.device(scale.device):
        model = resnet18(width, classes, groups)
    return Training(model, batch, of_each_row, f"{side} x {side}, N {N}")


def gpt2(scale: Scale) -> Training:
    """12 layers of 768, 12 heads, 50,257 tokens, sequences of 512."""
    N, T = (2, 6) if scale.tiny else (8, 512)
    sizes = (40, T, 16, 2, 2) if scale.tiny else (50257, T, 768, 12, 12)

    def batch() -> tuple[Tensor, Tensor]:
        both = torch.randint(sizes[0], (N, T + 1), device=scale.device)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    with torch.device(scale.device):
        model = LanguageModel(*sizes)
    return Training(model, batch, mean_over_positions, f"T {T}, N {N}")


MODELS = {"MLP": mlp, "ResNet-18, GroupNorm": resnet, "GPT-2 small": gpt2}
