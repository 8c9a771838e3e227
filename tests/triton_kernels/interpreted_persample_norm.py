"""persample_norm in Triton, run by its interpreter: by test_persample_norm.py, with TRITON_INTERPRET=1 set."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.triton_kernels import persample_norm as module
from kdaif_fast.triton_kernels.persample_norm import persample_norm
from kdaif_fast.triton_kernels.persample_tiles import product_of
from tests.triton_kernels.persample_cases import DTYPES, SHAPES, assert_close, expected, far_apart, inputs, strided


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_against_reference(dtype, shape, outputs):
    a, b = inputs(shape, outputs, dtype)
    ours = persample_norm(a, b)
    assert ours.dtype == torch.float32
    assert_close(ours, expected("persample_norm", a, b))


@pytest.mark.parametrize("way", [module._by_gram, module._by_gradient])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), [case for case in SHAPES if case[0][1] > 1])
def test_both_ways_of_several_positions(way, dtype, shape, outputs):
    a, b = inputs(shape, outputs, dtype)
    assert_close(way(a, b, product_of(a, b)), expected("persample_norm", a, b))


def test_many_tiles_of_a_gram_matrix():
    """Seven rows of tiles: each on and below the diagonal must be met once."""
    a, b = inputs((2, 200, 5), 3, torch.float32)
    assert_close(module._by_gram(a, b, product_of(a, b)), expected("persample_norm", a, b))


@pytest.mark.parametrize("T", [1, 6])
def test_strides_and_broadcasts(T):
    a, b = inputs((5, T, 20), 18, torch.float32)
    assert torch.equal(persample_norm(strided(a), strided(b)), persample_norm(a, b))
    shared = a[:1].expand(5, T, 20)
    assert torch.equal(persample_norm(shared, b), persample_norm(shared.clone(), b))


@pytest.mark.parametrize("T", [1, 3])
def test_samples_far_apart(T):
    a, b = inputs((3, T, 20), 18, torch.float16)
    assert torch.equal(persample_norm(far_apart(a), far_apart(b)), persample_norm(a, b))


def test_nothing_to_sum():
    for N, T, features, outputs in ((0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 3, 2, 0)):
        assert torch.equal(persample_norm(torch.ones(N, T, features), torch.ones(N, T, outputs)), torch.zeros(N))


@pytest.mark.parametrize("T", [1, 3, 40])
def test_a_sample_keeps_its_nan_to_itself(T):
    a, b = inputs((4, T, 20), 18, torch.float32)
    same = persample_norm(a, b)
    b[2, T - 1, 5] = torch.nan
    ours = persample_norm(a, b)
    assert ours[2].isnan()
    assert torch.equal(ours[[0, 1, 3]], same[[0, 1, 3]])


def test_forced_through_the_op():
    a, b = inputs((4, 3, 20), 18, torch.float32)
    with kdaif_fast.backend("triton"):
        assert torch.equal(torch.ops.kdaif_fast.persample_norm(a, b), persample_norm(a, b))
