"""persample_dot: against sample by sample and autograd, strides, both orders of summation, bad input."""

import pytest
import torch

from kdaif_fast.ops import persample_dot
from tests.ops.linear_layer_cases import (
    BAD_DIRECTIONS,
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


def check(inputs, output_grads, directions):
    ours = persample_dot(inputs, output_grads, directions)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    assert ours.dtype == wide
    v = directions.double()
    expected = torch.einsum("noi,koi->nk", gradients(inputs, output_grads), v)
    scale = torch.einsum("noi,koi->nk", gradients(inputs.abs(), output_grads.abs()), v.abs())
    assert_near(ours, expected, scale, wide)


def directions_of(K, shape, dtype=torch.float32):
    return torch.randn(K, shape[3], shape[2]).to(dtype)


@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("K", [0, 1, 3])
def test_against_each_sample(shape, K, dtype):
    check(*layer(*shape, dtype), directions_of(K, shape, dtype))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 20),
    T=st.integers(0, 80),
    I=st.integers(0, 60),
    O=st.integers(0, 60),
    K=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(N, T, I, O, K, dtype, seed):  # noqa: E741
    torch.manual_seed(seed)
    check(*layer(N, T, I, O, dtype), directions_of(K, (N, T, I, O), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("shape", [(5, 1, 19, 24), (3, 5, 35, 70), (3, 90, 10, 6)])
def test_strides(layout, shape, dtype):
    directions = directions_of(2, shape, dtype)
    check(*strided(layout, *shape, dtype), directions)
    check(*strided(layout, *shape, dtype), STRIDES[layout](directions))


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction_dtype", DTYPES)
def test_directions_of_any_dtype(T, dtype, direction_dtype):
    check(*layer(3, T, 20, 33, dtype), directions_of(2, (3, T, 20, 33), direction_dtype))


@pytest.mark.parametrize("T", [1, 6, 70])
def test_against_autograd(T):
    inputs, output_grads = layer(4, T, 9, 5)
    directions = torch.randn(3, 5, 9, dtype=torch.float64)
    expected = torch.einsum("noi,koi->nk", gradients_by_autograd(inputs, output_grads), directions)
    torch.testing.assert_close(persample_dot(inputs, output_grads, directions), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 4, 80])
def test_nan_stays_in_its_sample(T):
    inputs, output_grads = layer(4, T, 20, 20, torch.float32)
    inputs[2, 0, 3] = torch.nan
    dots = persample_dot(inputs, output_grads, torch.ones(2, 20, 20))
    assert dots.isnan().all(1).tolist() == [False, False, True, False]
    assert not dots[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize(("change", "error", "message"), BAD_LAYERS + BAD_DIRECTIONS)
def test_message(change, error, message):
    with pytest.raises(error, match="^persample_dot: " + message):
        persample_dot(**{"directions": torch.zeros(1, 6, 4), **arguments(**change)})
