"""The layers of torch.nn, each between two others, with the options that people give them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .zoo import CLASSES, add

VOCABULARY = 7


class Between(nn.Module):
    """A layer after a linear one, so that gradients have to pass it, and before a head that sees all of its output."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], tokens: bool = False):
        super().__init__()
        self.before = nn.Identity() if tokens else nn.Linear(shape[-1], shape[-1])
        self.layer = layer
        example = torch.zeros(2, *shape, dtype=torch.int64 if tokens else torch.float32)
        with torch.no_grad():
            features = layer.eval()(example).flatten(1).shape[1]
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.before(x))).flatten(1))


class Transposed(nn.Module):
    """A layer whose input is not contiguous."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, -1))


def shaken(layer: nn.Module) -> nn.Module:
    """Parameters off their initial ones and zeros, and buffers (running statistics) likewise."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return layer


def layer(name: str, build: Callable[[], nn.Module], *shape: int) -> None:
    add(name, lambda: Between(shaken(build()), shape), lambda n: torch.randn(n, *shape))


def lookup(name: str, build: Callable[[], nn.Module], *shape: int, **options) -> None:
    add(
        name,
        lambda: Between(build(), shape, tokens=True),
        lambda n: torch.randint(VOCABULARY, (n, *shape)),
        **options,
    )


# Linear
layer("linear", lambda: nn.Linear(5, 4), 5)
layer("linear, one extra dimension", lambda: nn.Linear(5, 4), 3, 5)
layer("linear, two extra dimensions", lambda: nn.Linear(5, 4), 2, 3, 5)
layer("linear without bias", lambda: nn.Linear(5, 4, bias=False), 3, 5)
layer("linear, input not contiguous", lambda: Transposed(nn.Linear(3, 4)), 3, 5)
layer("linear, four dimensions, not contiguous", lambda: Transposed(nn.Linear(2, 4)), 2, 3, 5)
layer("linear of one feature", lambda: nn.Linear(1, 1), 1)
layer("bilinear of itself", lambda: _Squared(nn.Bilinear(4, 4, 3)), 4)
layer("bilinear of sequences without bias", lambda: _Squared(nn.Bilinear(4, 4, 3, bias=False)), 2, 4)


class _Squared(nn.Module):
    def __init__(self, bilinear: nn.Module):
        super().__init__()
        self.bilinear = bilinear

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, torch.sin(x))


# Convolutions
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
EXTENT = {1: (9,), 2: (6, 7), 3: (4, 5, 4)}

for dimensions in (1, 2, 3):
    convolution, transposed, extent = CONVOLUTIONS[dimensions], TRANSPOSED[dimensions], EXTENT[dimensions]

    def convolve(name, *arguments, extent=extent, kind=convolution, dimensions=dimensions, **options):
        layer(f"{name} {dimensions}d", lambda: kind(*arguments, **options), arguments[0], *extent)

    convolve("convolution", 2, 3, 3)
    convolve("convolution with stride and padding", 2, 3, 3, stride=2, padding=1)
    convolve("convolution with dilation", 2, 3, 2, dilation=2, padding=1)
    convolve("convolution in groups", 4, 6, 3, groups=2, padding=1)
    convolve("depthwise convolution", 3, 6, 3, groups=3, padding=1, stride=2)
    convolve("pointwise convolution without bias", 3, 2, 1, bias=False)
    convolve("convolution, padding same", 2, 3, 3, padding="same", dilation=2)
    for mode in ("reflect", "replicate", "circular"):
        convolve(f"convolution, padding {mode}", 2, 3, 3, padding=1, stride=2, padding_mode=mode)
    convolve("transposed convolution", 2, 3, 3, kind=transposed)
    convolve(
        "transposed convolution with all options",
        4, 6, 3,
        kind=transposed, stride=2, padding=1, output_padding=1, groups=2, dilation=2, bias=False,
    )  # fmt: skip

layer("convolution, padding same, even kernel", lambda: nn.Conv2d(2, 3, 2, padding="same"), 2, 5, 6)
layer(
    "convolution, padding circular and same", lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), 2, 7
)
layer("convolution, unequal options", lambda: nn.Conv2d(2, 4, (1, 3), (2, 1), (0, 2), (1, 2), groups=2), 2, 5, 6)
layer("convolution of a transposed image", lambda: Transposed(nn.Conv2d(6, 3, 3, padding=1)), 2, 5, 6)
layer("convolution, kernel larger than the image", lambda: nn.Conv2d(2, 3, 7, padding=3), 2, 4, 5)
layer("convolution, channels last", lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), 3, 6, 6)

# Normalisation
layer("layer norm", lambda: nn.LayerNorm(5), 3, 5)
layer("layer norm of vectors", lambda: nn.LayerNorm(5), 5)
layer("layer norm over two axes", lambda: nn.LayerNorm((3, 5)), 2, 3, 5)
layer("layer norm over all axes", lambda: nn.LayerNorm((2, 3, 5)), 2, 3, 5)
layer("layer norm without affine", lambda: nn.LayerNorm(5, elementwise_affine=False), 3, 5)
layer("layer norm without bias", lambda: nn.LayerNorm(5, bias=False), 3, 5)
layer("RMS norm", lambda: nn.RMSNorm(5), 3, 5)
layer("RMS norm over two axes", lambda: nn.RMSNorm((3, 5), eps=1e-3), 2, 3, 5)
layer("group norm", lambda: nn.GroupNorm(2, 4), 4, 5, 3)
layer("group norm, one group", lambda: nn.GroupNorm(1, 4), 4, 5)
layer("group norm, as many groups as channels", lambda: nn.GroupNorm(4, 4), 4, 5)
layer("group norm of vectors", lambda: nn.GroupNorm(2, 6), 6)
layer("instance norm 1d", lambda: nn.InstanceNorm1d(3, affine=True), 3, 6)
layer("instance norm 2d", lambda: nn.InstanceNorm2d(3, affine=True), 3, 4, 5)
layer("instance norm 2d without affine", lambda: nn.InstanceNorm2d(3), 3, 4, 5)
layer("instance norm 3d", lambda: nn.InstanceNorm3d(2, affine=True), 2, 3, 4, 2)
layer(
    "instance norm with running statistics", lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), 3, 6
)
layer("batch norm 1d", lambda: nn.BatchNorm1d(5), 5)
layer("batch norm 1d of sequences", lambda: nn.BatchNorm1d(3), 3, 5)
layer("batch norm 2d", lambda: nn.BatchNorm2d(3), 3, 4, 5)
layer("batch norm 3d", lambda: nn.BatchNorm3d(2), 2, 3, 4, 2)
layer("local response norm", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.LocalResponseNorm(3)), 2, 5, 5)

# Activations with parameters
layer("PReLU", nn.PReLU, 3, 5)
layer("PReLU for every channel", lambda: nn.PReLU(3), 3, 5)
layer("PReLU of vectors", lambda: nn.PReLU(5), 5)

# Convolution and pooling as people stack them
layer(
    "convolutions and pooling",
    lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1),
    ),
    1, 6, 6,
)  # fmt: skip
layer("pixel shuffle", lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.PixelShuffle(2)), 2, 3, 4)

# Look-ups
lookup("embedding", lambda: nn.Embedding(VOCABULARY, 4), 5)
lookup("embedding of one token", lambda: nn.Embedding(VOCABULARY, 4))
lookup("embedding of a table of tokens", lambda: nn.Embedding(VOCABULARY, 4), 2, 3)
lookup("embedding with padding", lambda: nn.Embedding(VOCABULARY, 4, padding_idx=2), 5)
lookup("embedding scaled by frequency", lambda: nn.Embedding(VOCABULARY, 4, scale_grad_by_freq=True), 5, alone=False)
lookup("sparse embedding", lambda: nn.Embedding(VOCABULARY, 4, sparse=True), 5)
lookup("sparse embedding with padding", lambda: nn.Embedding(VOCABULARY, 4, sparse=True, padding_idx=0), 5)
for mode in ("sum", "mean", "max"):
    lookup(f"bag of embeddings, {mode}", lambda mode=mode: nn.EmbeddingBag(VOCABULARY, 4, mode=mode), 5)
    lookup(
        f"bag of embeddings, {mode}, with padding",
        lambda mode=mode: nn.EmbeddingBag(VOCABULARY, 4, mode=mode, padding_idx=1),
        5,
    )
for mode in ("sum", "mean"):
    lookup(
        f"bag of embeddings, {mode}, scaled by frequency",
        lambda mode=mode: nn.EmbeddingBag(VOCABULARY, 4, mode=mode, scale_grad_by_freq=True),
        5,
        alone=False,
    )
lookup("sparse bag of embeddings", lambda: nn.EmbeddingBag(VOCABULARY, 4, mode="sum", sparse=True), 5)


class Bags(nn.Module):
    """Bags of different sizes: indices one after another, and where each sample's begin."""

    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 4, **options)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, indices: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.bag(indices, offsets, per_sample_weights=weights)))


def ragged(n: int, *, last: bool, weighted: bool = False) -> tuple[Tensor, ...]:
    sizes = torch.tensor([3, 0, 5, 1, 2])[:n]  # one of them is empty
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    indices = torch.randint(VOCABULARY, (int(sizes.sum()),))
    parts = (indices, offsets if last else offsets[:-1])
    return (*parts, torch.randn(len(indices))) if weighted else parts


def take_bag(inputs: tuple[Tensor, ...], i: int, *, last: bool) -> tuple[Tensor, ...]:
    indices, offsets, *weights = inputs
    ends = offsets[1:] if last else torch.cat([offsets[1:], torch.tensor([len(indices)])])
    start, end = int(offsets[i]), int(ends[i])
    own = torch.tensor([0, end - start] if last else [0])
    return (indices[start:end], own, *(w[start:end] for w in weights))


for mode in ("sum", "mean", "max"):
    add(
        f"ragged bags, {mode}",
        lambda mode=mode: Bags(mode=mode),
        lambda n: ragged(n, last=False),
        take=lambda x, i: take_bag(x, i, last=False),
    )
    add(
        f"ragged bags, {mode}, last offset included",
        lambda mode=mode: Bags(mode=mode, include_last_offset=True),
        lambda n: ragged(n, last=True),
        take=lambda x, i: take_bag(x, i, last=True),
    )
add(
    "ragged bags with weights",
    lambda: Bags(mode="sum"),
    lambda n: ragged(n, last=False, weighted=True),
    take=lambda x, i: take_bag(x, i, last=False),
)
