"""persample_grad in Triton, run by its interpreter: by test_persample_grad.py, with TRITON_INTERPRET=1 set."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.triton_kernels.persample_grad import persample_grad
from tests.triton_kernels.persample_cases import (
    DTYPES,
    SHAPES,
    assert_close,
    expected,
    far_apart,
    inputs,
    rounding_of,
    strided,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_against_reference(dtype, shape, outputs):
    a, b = inputs(shape, outputs, dtype)
    ours = persample_grad(a, b)
    assert ours.dtype == dtype
    assert_close(ours, expected("persample_grad", a, b), rounding_of(dtype))


@pytest.mark.parametrize("T", [1, 6])
def test_strides_and_broadcasts(T):
    a, b = inputs((5, T, 40), 35, torch.float32)
    assert torch.equal(persample_grad(strided(a), strided(b)), persample_grad(a, b))
    shared = a[:1].expand(5, T, 40)
    assert torch.equal(persample_grad(shared, b), persample_grad(shared.clone(), b))


@pytest.mark.parametrize("T", [1, 3])
def test_samples_far_apart(T):
    a, b = inputs((3, T, 20), 18, torch.float16)
    assert torch.equal(persample_grad(far_apart(a), far_apart(b)), persample_grad(a, b))


def test_nothing_to_sum():
    for N, T, features, outputs in ((0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 3, 2, 0)):
        ours = persample_grad(torch.ones(N, T, features), torch.ones(N, T, outputs))
        assert torch.equal(ours, torch.zeros(N, outputs, features))


@pytest.mark.parametrize("T", [1, 3])
def test_a_number_that_is_not_one_stays_in_its_row(T):
    a, b = inputs((3, T, 20), 18, torch.float32)
    same = persample_grad(a, b)
    b[1, 0, 5] = torch.nan
    ours = persample_grad(a, b)
    assert ours[1, 5].isnan().all()
    ours[1, 5] = same[1, 5]
    assert torch.equal(ours, same)


def test_forced_through_the_op():
    a, b = inputs((4, 3, 20), 18, torch.float32)
    with kdaif_fast.backend("triton"):
        assert torch.equal(torch.ops.kdaif_fast.persample_grad(a, b), persample_grad(a, b))
