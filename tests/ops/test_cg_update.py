"""cg_update and cg_dots: against their definitions, frozen columns, strides, threads, bad input."""

import pytest
import torch

from kdaif_fast import reference
from kdaif_fast.ops import cg_dots, cg_update
from kdaif_fast.reference import cg_update as definition
from tests.properties import given, settings, st

DTYPES = [torch.float32, torch.float64]
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 7), (1, 16), (3, 8191), (2, 8192), (1, 8193), (2, 40_003)]


def vectors(K, P, dtype):
    x, r, p, Ap, best = torch.randn(5, K, P, dtype=dtype).unbind()
    steps = torch.randn(K, dtype=dtype)
    steps[1::3] = 0
    return x, r, p, Ap, steps, best, torch.arange(K) % 2 == 0


def check(K, P, dtype, damping=0.3, keeps=True, function=cg_update):
    x, r, p, Ap, steps, best, keep = vectors(K, P, dtype)
    kept = {"best": best, "keep": keep} if keeps else {"best": None, "keep": None}
    wide = best.clone().double(), keep
    wide_x, wide_r = x.clone().double(), r.clone().double()
    expected = definition.cg_update(
        wide_x, wide_r, p.double(), Ap.double(), steps.double(), damping, *(wide if keeps else (None, None))
    )
    squares = function(x, r, p, Ap, steps, damping, **kept)
    assert squares.dtype == dtype
    tolerance = {"rtol": 3e-6, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(x.double(), wide_x, **tolerance)
    torch.testing.assert_close(r.double(), wide_r, **tolerance)
    torch.testing.assert_close(squares.double(), expected, rtol=tolerance["rtol"], atol=1e-12)
    if keeps:
        assert torch.equal(best, wide[0].to(dtype))  # a copy, to the bit


@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_against_definition(shape, dtype, keeps):
    check(*shape, dtype, keeps=keeps)
    check(*shape, dtype, damping=0.0, keeps=keeps)


@pytest.mark.usefixtures("poisoned_memory", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dots_against_definition(shape, dtype):
    p, q = torch.randn(2, *shape, dtype=dtype).unbind()
    dots = cg_dots(p, q)
    assert dots.dtype == dtype
    expected = torch.stack([(p.double() * q.double()).sum(1), p.double().square().sum(1)])
    size = (p.double().norm(dim=1) * q.double().norm(dim=1)).expand(2, -1)
    # Sums are in float64 for both: of float64, what n additions round to goes with the root of n, here and in PyTorch.
    units = 2 if dtype == torch.float32 else max(2, shape[1] ** 0.5 / 8)
    assert ((dots.double() - expected).abs() <= units * torch.finfo(dtype).eps * torch.maximum(size, expected)).all()


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(0, 5),
    P=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    keeps=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(K, P, dtype, keeps, seed):
    torch.manual_seed(seed)
    check(K, P, dtype, keeps=keeps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_0_leaves_a_column_alone_whatever_its_product_is(dtype):
    x, r, p, Ap, steps, _, _ = vectors(3, 20_000, dtype)
    steps[1] = 0
    p[1, 5], Ap[1] = torch.inf, torch.nan
    before = x[1].clone(), r[1].clone()
    squares = cg_update(x, r, p, Ap, steps, 0.5)
    assert torch.equal(x[1], before[0])
    assert torch.equal(r[1], before[1])
    assert squares.isfinite().all()
    steps[1] = torch.nan
    assert cg_update(x, r, p, Ap, steps, 0.5).isnan().tolist() == [False, True, False]


def test_sums_do_not_depend_on_threads():
    p, q = torch.randn(2, 3, 100_003).unbind()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, r = torch.zeros_like(p), q.clone()
        results.append(torch.cat([cg_dots(p, q).flatten(), cg_update(x, r, p, q, torch.full((3,), 0.3), 0.1)]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_long_sums_keep_their_digits():
    """Float32 sums of 4 million ones would be off in the fourth digit if they were formed in one accumulator."""
    ones = torch.ones(1, 4_000_000)
    assert cg_dots(ones, ones)[0].item() == 4_000_000
    assert cg_update(ones.clone(), 3 * ones, ones, ones, torch.ones(1)).item() == 16_000_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    wide = torch.randn(5, 3, 50, dtype=dtype)
    x, r, best = (wide[i, :, 7:30] for i in range(3))  # rows that lie apart
    p, Ap = torch.randn(2, 23, 3, dtype=dtype).transpose(1, 2).unbind()
    steps = torch.randn(6, dtype=dtype)[::2]
    expected_x, expected_r, expected_best = x.clone(), r.clone(), best.clone()
    outside = wide[:, :, 30:].clone()
    keep = torch.tensor([True, False, False, False, True, True])[::2]
    expected = cg_update(
        expected_x, expected_r, p.contiguous(), Ap.contiguous(), steps.contiguous(), 0.1, best=expected_best, keep=keep
    )
    assert torch.equal(cg_update(x, r, p, Ap, steps, 0.1, best=best, keep=keep), expected)
    for ours, same in ((x, expected_x), (r, expected_r), (best, expected_best), (wide[:, :, 30:], outside)):
        assert torch.equal(ours, same)
    assert torch.equal(cg_dots(p, x), cg_dots(p.contiguous(), x.contiguous()))


def test_one_direction_for_all_right_hand_sides():
    p = torch.randn(1, 30).expand(3, 30)
    assert torch.equal(cg_dots(p, p), cg_dots(p.clone(), p.clone()))


def test_autograd_notices_what_is_overwritten():
    x, r, p, Ap, steps, _, _ = vectors(2, 5, torch.float64)
    weight = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    product = (weight * x).sum()
    cg_update(x, r, p, Ap, steps)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_under_autograd_the_definition_stands_in():
    x, r, p, Ap, steps, _, _ = vectors(2, 5, torch.float64)
    steps = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: cg_update(x.clone(), r.clone(), p, Ap, a, 0.2), steps)
    q = p.clone().requires_grad_()
    assert torch.autograd.gradcheck(cg_dots, (q, Ap))
    torch.testing.assert_close(
        torch.func.vmap(cg_dots)(torch.stack([p, Ap]), torch.stack([r, x])),
        torch.stack([cg_dots(p, r), cg_dots(Ap, x)]),
    )


def test_inside_inference_mode():
    with torch.inference_mode():
        x, r = torch.zeros(1, 3), torch.ones(1, 3)
        assert cg_update(x, r, r.clone(), r.clone(), torch.ones(1)).item() == 0


GOOD = {
    "x": torch.zeros(2, 3),
    "r": torch.zeros(2, 3),
    "p": torch.zeros(2, 3),
    "Ap": torch.zeros(2, 3),
    "steps": torch.zeros(2),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x is \[1.0\] \(list\), expected a torch.Tensor"),
        ({"x": torch.zeros(2, 3).half()}, TypeError, "x has dtype torch.float16, expected float32 or float64"),
        ({"x": torch.zeros(3)}, ValueError, r"x has shape \(3,\), expected \[K, P\]"),
        ({"r": torch.zeros(2, 4)}, ValueError, r"r has shape \(2, 4\), expected \(2, 3\) as x"),
        ({"p": torch.zeros(2, 3).double()}, TypeError, "p has dtype torch.float64, expected torch.float32 as x"),
        ({"Ap": torch.zeros(2, 3, device="meta")}, ValueError, "Ap is on device meta, expected cpu as x"),
        ({"steps": torch.zeros(3)}, ValueError, r"steps has shape \(3,\), expected \(2,\)"),
        ({"steps": torch.zeros(2).double()}, TypeError, "steps has dtype torch.float64, expected torch.float32"),
        ({"damping": float("nan")}, ValueError, "damping is nan, expected a finite number"),
        ({"best": torch.zeros(2, 3)}, ValueError, "keep is None, expected a tensor"),
        ({"best": torch.zeros(2, 3), "keep": torch.zeros(2)}, TypeError, "keep has dtype torch.float32"),
        ({"r": torch.zeros(3, 2).T}, ValueError, r"r has strides \(1, 2\), expected contiguous rows"),
    ],
)
def test_message(change, error, message):
    with pytest.raises(error, match="^cg_update: " + message):
        cg_update(**GOOD | change)


def test_message_of_dots():
    with pytest.raises(ValueError, match=r"^cg_dots: q has shape \(2, 4\), expected \(2, 3\) as p"):
        cg_dots(torch.zeros(2, 3), torch.zeros(2, 4))


def test_reference_is_what_the_formula_says():
    x, r, p, Ap, steps, best, keep = vectors(2, 4, torch.float64)
    a = steps[:, None]
    after = x + a * p, r - a * Ap - a * 0.7 * p
    before = x.clone()
    squares = reference.cg_update.cg_update(x, r, p, Ap, steps, 0.7, best, keep)
    torch.testing.assert_close(x, after[0])
    torch.testing.assert_close(r, after[1])
    torch.testing.assert_close(squares, after[1].square().sum(1))
    assert torch.equal(best[0], before[0])
    assert not torch.equal(best[1], before[1])
