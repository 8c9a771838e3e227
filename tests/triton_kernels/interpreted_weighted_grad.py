"""weighted_grad in Triton, run by its interpreter: by test_weighted_grad.py, with TRITON_INTERPRET=1 set."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.triton_kernels.weighted_grad import parts_of_positions, weighted_grad
from tests.triton_kernels.persample_cases import (
    DTYPES,
    SHAPES,
    assert_close,
    expected,
    far_apart,
    inputs,
    rounding_of,
    strided,
    weights,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_against_reference(dtype, shape, outputs):
    a, b = inputs(shape, outputs, dtype)
    w = weights(shape[0])
    ours = weighted_grad(a, b, w)
    assert ours.dtype == dtype
    assert_close(ours, expected("weighted_grad", a, b, w), rounding_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1700, 1, 10), (240, 7, 10)])
def test_positions_in_parts(dtype, shape):
    """Parts that end within a sample, and a last one that is short."""
    a, b = inputs(shape, 9, dtype)
    w = weights(shape[0])
    parts = parts_of_positions(shape[0] * shape[1], 9, 10, a.numel())
    assert parts.number >= 3
    assert shape[0] * shape[1] % parts.positions
    assert_close(weighted_grad(a, b, w), expected("weighted_grad", a, b, w), rounding_of(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_samples(dtype):
    """T divides into steps: sums of samples are weighted, in parts that begin and end within one too."""
    for shape in ((9, 96, 33), (4, 384, 10)):
        a, b = inputs(shape, 9, dtype)
        w = weights(shape[0])
        assert_close(weighted_grad(a, b, w), expected("weighted_grad", a, b, w), rounding_of(dtype))
    parts = parts_of_positions(4 * 384, 9, 10, a.numel())
    assert parts.number == 3
    assert parts.positions % 384


def test_small_weights_of_float16():
    """w b leaves float16's range; the sum does not."""
    a, b = inputs((6, 2, 20), 18, torch.float16)
    a, b, w = a * 100, b * 1e-3, weights(6) * 1e-4
    assert_close(weighted_grad(a, b, w), expected("weighted_grad", a, b, w), 2**-8)


def test_strides_broadcasts_and_weights_of_any_dtype():
    a, b = inputs((5, 3, 20), 18, torch.float32)
    w = weights(5)
    same = weighted_grad(a, b, w)
    assert torch.equal(weighted_grad(strided(a), strided(b), torch.stack((w, w), 1)[:, 1]), same)
    shared = a[:1].expand(5, 3, 20)
    assert torch.equal(weighted_grad(shared, b, w[:1].expand(5)), weighted_grad(shared.clone(), b, w[[0] * 5]))
    assert torch.equal(weighted_grad(a, b, w.bfloat16()), weighted_grad(a, b, w.bfloat16().float()))


@pytest.mark.parametrize("T", [1, 3])
def test_samples_far_apart(T):
    a, b = inputs((3, T, 20), 18, torch.float16)
    w = weights(3)
    far = weighted_grad(far_apart(a), far_apart(b), w)
    assert_close(far, expected("weighted_grad", a, b, w), rounding_of(torch.float16))


def test_nothing_to_sum():
    for N, T, features, outputs in ((0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 3, 2, 0)):
        ours = weighted_grad(torch.ones(N, T, features), torch.ones(N, T, outputs), torch.ones(N))
        assert torch.equal(ours, torch.zeros(outputs, features))


def test_forced_through_the_op():
    a, b = inputs((4, 3, 20), 18, torch.float32)
    with kdaif_fast.backend("triton"):
        assert torch.equal(torch.ops.kdaif_fast.weighted_grad(a, b, weights(4)), weighted_grad(a, b, weights(4)))
