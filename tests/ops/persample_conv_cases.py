"""What the tests of persample_conv share: layers, inputs, tolerances, and where the op is."""

import importlib
from typing import NamedTuple

import torch
from torch.nn import functional as F

import kdaif_fast
from kdaif_fast.reference import persample_conv as reference

ops = importlib.import_module("kdaif_fast.ops.persample_conv")

HAS_KERNELS = kdaif_fast.backends()["cpu"] == "loaded"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Layer(NamedTuple):
    """A convolution; the sizes of `size`, kernel, stride, padding and dilation are those of the spatial axes."""

    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def options(self):
        return {name: list(getattr(self, name)) for name in ("kernel", "stride", "padding", "dilation")} | {
            "groups": self.groups
        }

    @property
    def arguments(self):
        return tuple(self.options.values())

    @property
    def weight_shape(self):
        return (self.outputs, self.channels // self.groups, *self.kernel)

    def __call__(self, x, weight):
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        return conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def square(channels, outputs, size, kernel, stride=1, padding=0, dilation=1, groups=1, axes=2):
    numbers = (size, kernel, stride, padding, dilation)
    return Layer(channels, outputs, *((n,) * axes for n in numbers), groups)


LAYERS = {
    "first": square(3, 32, 9, 3, padding=1),
    "wide": square(17, 50, 7, 3, padding=1),
    "stride": square(16, 33, 9, 3, stride=2, padding=1),
    "one by one, stride 2": square(5, 16, 8, 1, stride=2),
    "one by one": square(40, 10, 3, 1),
    "dilation": square(4, 7, 9, 3, padding=2, dilation=2),
    "uneven": Layer(3, 5, (6, 11), (2, 5), (1, 3), (0, 4), (3, 1)),
    "padding beyond the kernel": square(2, 3, 4, 1, padding=2),
    "whole image": square(6, 20, 5, 5),
    "many positions": square(1, 2, 23, 2),  # more than one block of 256
    "two groups": square(6, 40, 6, 3, padding=1, groups=2),
    "groups of 4": square(64, 64, 5, 3, padding=1, groups=16),
    "depthwise": square(37, 37, 6, 3, padding=1, groups=37),
    "depthwise, 2 each, strided": square(20, 40, 19, 3, stride=2, groups=20, padding=1),
    "1 axis": square(4, 20, 30, 5, padding=2, axes=1),
    "3 axes": square(3, 18, 5, 3, stride=2, padding=1, axes=3),
}


def inputs(layer, N=3, dtype=torch.float64, K=2):
    """Inputs, output gradients and directions, rounded to the dtype."""
    x = torch.randn(N, layer.channels, *layer.size, dtype=torch.float64)
    shape = layer(x[:1] if N else x.new_zeros(1, *x.shape[1:]), x.new_zeros(layer.weight_shape)).shape[1:]
    b = torch.randn(N, *shape, dtype=torch.float64)
    V = torch.randn(K, *layer.weight_shape, dtype=torch.float64).to(dtype)
    return x.to(dtype), b.to(dtype), V


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def expected_of(x, b, V, layer):
    """The definition in float64: G, dots, squared norms."""
    return reference.persample_conv(
        x.double(), b.double(), None if V is None else V.double(), *layer.arguments, True, True
    )


def assert_close(ours, expected, dtype, magnitude):
    """To the rounding of sums, relative to the largest sum of magnitudes: terms of both signs may cancel."""
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert ours.shape == expected.shape
    if expected.numel():
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * float(magnitude.abs().max()))


def magnitudes(x, b, V, layer):
    """What the results would be if nothing cancelled."""
    return expected_of(x.abs(), b.abs(), None if V is None else V.abs(), layer)
