"""What the convolutions' terms do on a GPU that cannot be looked at here: fake CUDA tensors, and torch's own answers."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdaif_fast.per_sample.layout import Layout
from kdaif_fast.per_sample.terms.convolution import Convolution, ConvolutionTerm

composed = importlib.import_module("kdaif_fast.ops._conv_by_torch")
NUMBERS = Convolution((2, 2), (1, 1), (1, 1), 1, False, (0, 0))


def fake(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_no_per_sample_gradient_is_kept():
    """Though on a CPU it would be, of an image of this size."""
    with FakeTensorMode():
        term = ConvolutionTerm(fake(4, 3, 32, 32), fake(4, 8, 16, 16), NUMBERS, Layout(0), 4, torch.Size((8, 3, 3, 3)))
        dots, kept = term.step(fake(2, 8, 3, 3, 3, dtype=torch.float32))
    assert (dots.shape, dots.dtype, dots.is_cuda) == ((4, 2), torch.float32, True)
    assert kept is term


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dots_as_cuda_gets_them(transposed, dtype, monkeypatch):
    """With the directions as they come, of any dtype, straight to what CUDA tensors get."""
    torch.manual_seed(0)
    make, convolve = ((3, 5, 4, 2), torch.conv_transpose2d) if transposed else ((5, 3, 4, 2), torch.conv2d)
    weight = torch.zeros(make, dtype=torch.float64)
    x = torch.randn(4, 3, 7, 9, dtype=torch.float64).to(dtype)
    z = convolve(x.double(), weight, None, 2, 1)
    b = torch.randn_like(z).to(dtype)
    term = ConvolutionTerm(x, b, Convolution((2, 2), (1, 1), (1, 1), 1, transposed, (0, 0)), Layout(0), 4, weight.shape)
    V = torch.randn(2, *make)
    dots = composed.persample_conv(*term._pair, V, term.shape[2:], (2, 2), (1, 1), (1, 1), 1, False, False)[1]
    truth = torch.stack([(b.double() * convolve(x.double(), v.double(), None, 2, 1)).sum((1, 2, 3)) for v in V], 1)
    size = torch.stack(
        [(b.double() * convolve(x.double().abs(), v.double().abs(), None, 2, 1)).abs().sum((1, 2, 3)) for v in V], 1
    )
    assert bool(((dots - truth).abs() <= (1e-6 if dtype == torch.float64 else 2**-8) * size).all())


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
