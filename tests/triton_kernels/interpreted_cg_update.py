"""cg_update and cg_dots in Triton, run by its interpreter: by test_cg_update.py, with TRITON_INTERPRET=1 set."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.ops import cg_dots as dots_op
from kdaif_fast.ops import cg_update as update_op
from kdaif_fast.triton_kernels import cg_update as module
from tests.ops.test_cg_update import check, vectors

SHAPES = [(0, 5), (3, 0), (1, 1), (3, 7), (2, 40_003)]


def triton_update(x, r, p, Ap, steps, damping, best=None, keep=None):
    return module.cg_update(x, r, p, Ap, steps, damping, best, keep)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_against_definition(shape, keeps):
    check(*shape, torch.float32, keeps=keeps, function=triton_update)


@pytest.mark.parametrize("shape", SHAPES)
def test_dots_against_definition(shape):
    p, q = torch.randn(2, *shape).unbind()
    torch.testing.assert_close(module.cg_dots(p, q), dots_op(p, q), rtol=1e-5, atol=1e-2)


def test_rows_that_lie_apart_and_what_is_between_them():
    wide = torch.randn(3, 3, 50)
    x, r, best = (wide[i, :, 7:30] for i in range(3))
    p, Ap = torch.randn(2, 23, 3).transpose(1, 2).unbind()
    steps, keep = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([True, False, True])
    same = wide.clone()
    expected = update_op(*(same[i, :, 7:30] for i in range(2)), p, Ap, steps, 0.1, best=same[2, :, 7:30], keep=keep)
    torch.testing.assert_close(module.cg_update(x, r, p, Ap, steps, 0.1, best, keep), expected)
    torch.testing.assert_close(wide, same)


def test_a_step_of_0_leaves_a_column_alone_whatever_its_product_is():
    x, r, p, Ap, steps, _, _ = vectors(3, 100, torch.float32)
    Ap[1] = torch.nan
    before = x[1].clone(), r[1].clone()
    assert module.cg_update(x, r, p, Ap, steps, 0.5).isfinite().all()
    assert torch.equal(x[1], before[0])
    assert torch.equal(r[1], before[1])


def test_forced_through_the_op():
    check(3, 300, torch.float32)
    with kdaif_fast.backend("triton"):
        check(3, 300, torch.float32)
        check(3, 300, torch.float64)  # by the reference
