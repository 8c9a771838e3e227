"""persample_norm: against sample by sample and autograd, strides, both orders of summation, bad input."""

import pytest
import torch

from kdaif_fast.ops import persample_norm
from tests.ops.linear_layer_cases import (
    BAD_LAYERS,
    DTYPES,
    SHAPES,
    STRIDES,
    arguments,
    assert_near,
    gradients,
    gradients_by_autograd,
    layer,
    strided,
)
from tests.properties import given, settings, st


def check(inputs, output_grads):
    ours = persample_norm(inputs, output_grads)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    assert ours.dtype == wide
    expected = gradients(inputs, output_grads).square().sum((1, 2))
    scale = gradients(inputs.abs(), output_grads.abs()).square().sum((1, 2))
    assert_near(ours, expected, scale, wide)


@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_each_sample(shape, dtype):
    check(*layer(*shape, dtype))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 6),
    T=st.integers(0, 80),
    I=st.integers(0, 60),
    O=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(N, T, I, O, dtype, seed):  # noqa: E741
    torch.manual_seed(seed)
    check(*layer(N, T, I, O, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("shape", [(5, 1, 19, 24), (3, 18, 35, 70), (3, 90, 10, 6)])
def test_strides(layout, shape, dtype):
    check(*strided(layout, *shape, dtype))


def test_against_autograd():
    inputs, output_grads = layer(4, 6, 9, 5)
    expected = gradients_by_autograd(inputs, output_grads).square().sum((1, 2))
    torch.testing.assert_close(persample_norm(inputs, output_grads), expected, rtol=1e-12, atol=0)


def test_positions_that_cancel_do_not_go_below_zero():
    inputs = torch.randn(50, 1, 40).expand(50, 2, 40)
    output_grads = torch.randn(50, 1, 64) * torch.tensor([1.0, -1.0])[:, None]
    norms = persample_norm(inputs, output_grads)
    scale = gradients(inputs.abs(), output_grads.abs()).square().sum((1, 2))
    assert (norms >= 0).all()
    assert (norms <= 1e-6 * scale).all()


@pytest.mark.parametrize("T", [1, 4, 80])
def test_nan_stays_in_its_sample(T):
    inputs, output_grads = layer(4, T, 20, 20, torch.float32)
    inputs[2, 0, 3] = torch.nan
    assert persample_norm(inputs, output_grads).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LAYERS)
def test_message(change, error, message):
    with pytest.raises(error, match="^persample_norm: " + message):
        persample_norm(**arguments(**change))
