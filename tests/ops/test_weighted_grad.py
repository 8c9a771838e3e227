"""weighted_grad: against sample by sample and autograd, strides, weights of every kind, bad input."""

import pytest
import torch

from kdaif_fast.ops import weighted_grad
from tests.ops.linear_layer_cases import (
    BAD_LAYERS,
    DTYPES,
    SHAPES,
    STRIDES,
    arguments,
    assert_near,
    gradients,
    layer,
    strided,
)
from tests.properties import given, settings, st


def check(inputs, output_grads, weights):
    ours = weighted_grad(inputs, output_grads, weights)
    assert ours.dtype == inputs.dtype
    w = weights.double()[:, None, None]
    expected = (w * gradients(inputs, output_grads)).sum(0)
    scale = (w.abs() * gradients(inputs.abs(), output_grads.abs())).sum(0)
    assert_near(ours, expected, scale, inputs.dtype)


@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_each_sample(shape, dtype):
    check(*layer(*shape, dtype), torch.randn(shape[0]))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 40),
    T=st.integers(0, 30),
    I=st.integers(0, 60),
    O=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(N, T, I, O, dtype, seed):  # noqa: E741
    torch.manual_seed(seed)
    check(*layer(N, T, I, O, dtype), torch.randn(N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("shape", [(5, 1, 19, 24), (3, 18, 35, 70)])
def test_strides(layout, shape, dtype):
    check(*strided(layout, *shape, dtype), torch.randn(shape[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_any_dtype_and_stride(dtype, weight_dtype):
    inputs, output_grads = layer(6, 3, 20, 7, dtype)
    check(inputs, output_grads, torch.randn(12).to(weight_dtype)[::2])
    check(inputs, output_grads, torch.randn(1).to(weight_dtype).expand(6))


def test_bfloat16_is_rounded_once():
    inputs, output_grads = layer(600, 1, 20, 30, torch.bfloat16)
    weights = torch.rand(600)
    exact = (weights.double()[:, None, None] * gradients(inputs, output_grads)).sum(0)
    ours = weighted_grad(inputs, output_grads, weights).double()
    assert ((ours - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_against_autograd():
    inputs, output_grads = layer(4, 6, 9, 5)
    weights = torch.randn(4, dtype=torch.float64)
    module = torch.nn.Linear(9, 5, bias=False, dtype=torch.float64)
    ((module(inputs) * output_grads).sum((1, 2)) * weights).sum().backward()
    torch.testing.assert_close(weighted_grad(inputs, output_grads, weights), module.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_LAYERS,
        ({"weights": 1.0}, TypeError, r"weights is 1.0 \(float\), expected a torch.Tensor"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\), expected \(2,\) as the number of samples"),
        ({"weights": torch.ones(2, 3)}, ValueError, r"weights has shape \(2, 3\), expected \(2,\)"),
        ({"weights": torch.ones(2).long()}, TypeError, "weights has dtype torch.int64, expected one of float32"),
        ({"weights": torch.ones(2, device="meta")}, ValueError, "weights is on device meta, expected cpu"),
    ],
)
def test_message(change, error, message):
    with pytest.raises(error, match="^weighted_grad: " + message):
        weighted_grad(**{"weights": torch.ones(2), **arguments(**change)})
