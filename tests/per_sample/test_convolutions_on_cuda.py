"""What the convolutions' terms do on a GPU, with CPU tensors: dots from convolutions, and nothing kept."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from kdaif_fast.ops import persample_conv
from kdaif_fast.per_sample.layout import Layout
from kdaif_fast.per_sample.terms.convolution import Convolution, ConvolutionTerm

composed = importlib.import_module("kdaif_fast.ops._conv_by_torch")
module = importlib.import_module("kdaif_fast.per_sample.terms.convolution")
NUMBERS = Convolution((2, 2), (1, 1), (1, 1), 1, False, (0, 0))
OPTIONS = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]}


@pytest.fixture
def as_on_cuda(monkeypatch):
    """CPU tensors get what CUDA tensors do; yields what was asked for besides dots."""
    asked = []

    def kernel(*args):
        asked.append(args[-2:])
        return composed.persample_conv(*args)

    monkeypatch.setattr(ConvolutionTerm, "by_convolution", True)
    monkeypatch.setattr(module, "_KERNELS", SimpleNamespace(persample_conv=SimpleNamespace(default=kernel)))
    return asked


def step(x, b, numbers, V):
    term = ConvolutionTerm(x, b, numbers, Layout(0), len(x), V.shape[1:])
    dots, kept = term.step(V)
    assert kept is term
    return dots


def test_no_per_sample_gradient_is_formed_or_kept(as_on_cuda):
    """Though on a CPU it would be, of an image of this size."""
    x, b, V = torch.randn(4, 3, 32, 32), torch.randn(4, 8, 16, 16), torch.randn(2, 8, 3, 3, 3)
    dots = step(x, b, NUMBERS, V)
    assert as_on_cuda == [(False, False)]
    torch.testing.assert_close(dots, persample_conv(x, b, V, **OPTIONS).dots, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dots(transposed, dtype, as_on_cuda):
    """With the directions as they come, of another dtype than the layer's."""
    torch.manual_seed(0)
    shape, convolve = ((3, 5, 4, 2), torch.conv_transpose2d) if transposed else ((5, 3, 4, 2), torch.conv2d)
    x = torch.randn(4, 3, 7, 9, dtype=torch.float64).to(dtype)
    b = torch.randn_like(convolve(x, torch.zeros(shape, dtype=dtype), None, 2, 1))
    V = torch.randn(2, *shape)
    dots = step(x, b, Convolution((2, 2), (1, 1), (1, 1), 1, transposed, (0, 0)), V)
    x, b = x.double(), b.double()
    truth = torch.stack([(b * convolve(x, v.double(), None, 2, 1)).sum((1, 2, 3)) for v in V], 1)
    size = torch.stack([(b.abs() * convolve(x.abs(), v.abs().double(), None, 2, 1)).sum((1, 2, 3)) for v in V], 1)
    assert bool(((dots - truth).abs() <= (1e-12 if dtype == torch.float64 else 2**-8) * size).all())


@pytest.mark.parametrize("channels", [1, 20])
def test_weights_go_onto_the_smaller_of_two(channels):
    """And the sum is the same whichever that is."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, channels, 8, 8, dtype=torch.float64), torch.zeros(6, channels, 3, 3)
    b, weights = torch.randn(4, 6, 4, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    term = ConvolutionTerm(x, b, NUMBERS, Layout(0), 4, weight.shape)
    torch.testing.assert_close(term.weighted(weights), (weights.view(-1, 1, 1, 1, 1) * term.grads()).sum(0))
    seen = []

    class Seen(Layout):
        def scale(self, x, weights):
            seen.append(x)
            return super().scale(x, weights)

    term.layout = Seen(0)
    term.weighted(weights)
    assert seen[0] is (x if channels == 1 else b)
