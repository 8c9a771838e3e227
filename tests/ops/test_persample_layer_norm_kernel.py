"""The CPU kernel of persample_layer_norm against the definition: every dtype, awkward shapes, strides."""

import importlib
import math

import pytest
import torch

import kdaif_fast
from kdaif_fast.reference import persample_layer_norm as reference
from tests.properties import given, settings, st

ops = importlib.import_module("kdaif_fast.ops.persample_layer_norm")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.skipif(kdaif_fast.backends()["cpu"] != "loaded", reason="no compiled CPU kernels here"),
    pytest.mark.usefixtures("poisoned_memory"),
]


SHAPES = [(0, 3, 5), (2, 0, 5), (1, 1, 1), (3, 4, 16), (2, 5, 17), (3, 7, 33), (1, 9, 200), (4, 6, 70)]
LARGE = [(1, 40, 1000), (2, 65, 300), (40, 33, 64)]


def inputs(N, T, D, dtype=torch.float64):
    x, b = (torch.randn(N, T, D, dtype=torch.float64).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    return x, b, torch.randn(N, T, dtype=wide), torch.rand(N, T, dtype=wide) + 0.5


def run(*arguments):
    return ops._persample_layer_norm(*arguments)


def definition(*arguments):
    return reference.persample_layer_norm(*(None if t is None else t.double() for t in arguments))


def assert_all_close(x, b, mean, rstd):
    """To the rounding of sums, relative to what they would be if nothing cancelled."""
    sizes = definition(x.abs(), b.abs(), None if mean is None else -mean.abs(), rstd)
    for ours, truth, size in zip(run(x, b, mean, rstd), definition(x, b, mean, rstd), sizes, strict=True):
        assert ours.dtype == torch.promote_types(x.dtype, torch.float32)
        tolerance = 1e-14 if x.dtype == torch.float64 else 1e-6
        largest = float(size.max()) if size.numel() else 0.0
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("has_mean", [False, True])
def test_against_the_definition(shape, dtype, has_mean):
    x, b, mean, rstd = inputs(*shape, dtype)
    assert_all_close(x, b, mean if has_mean else None, rstd)


@settings(max_examples=80, deadline=None)
@given(
    N=st.integers(0, 5),
    T=st.integers(0, 12),
    D=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(N, T, D, dtype, seed):
    torch.manual_seed(seed)
    assert_all_close(*inputs(N, T, D, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    x, b, mean, rstd = inputs(*SHAPES[-1], dtype)
    expected = run(x, b, mean, rstd)
    wider = torch.full((*x.shape[:2], x.shape[2] + 9), math.nan, dtype=dtype)
    wider[..., 4:-5] = x
    layouts = {
        "last axis strided": x.transpose(1, 2).contiguous().transpose(1, 2),
        "first axis last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "part of wider rows": wider[..., 4:-5],
        "every other sample": x.repeat_interleave(2, 0)[::2],
    }
    apart = [s.t().contiguous().t() for s in (mean, rstd)]
    for name, view in layouts.items():
        for ours in (run(view, b, *apart), run(x, b.transpose(1, 2).contiguous().transpose(1, 2), mean, rstd)):
            assert all(torch.equal(a, e) for a, e in zip(ours, expected, strict=True)), name
    expanded = b[:, :, :1].expand_as(b)
    assert_all_close(x, expanded, mean, rstd)


def test_result_does_not_depend_on_threads(threads):
    for shape in SHAPES + LARGE:
        arguments = inputs(*shape, torch.float32)
        ours, before = run(*arguments), torch.get_num_threads()
        torch.set_num_threads(1)
        single = run(*arguments)
        torch.set_num_threads(before)
        assert all(torch.equal(a, e) for a, e in zip(ours, single, strict=True))


def test_a_large_mean_costs_no_digits():
    """Centred before it is summed: the sums of b x and of b would agree in most of their digits."""
    x, b, mean, rstd = inputs(*SHAPES[-1], torch.float32)
    x, mean = (x + 4096).round(decimals=2), mean.mul(0).add(4096)
    expected = reference.persample_layer_norm(x.double(), b.double(), mean.double(), rstd.double())[0]
    ours = run(x, b, mean, rstd)[0].double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_the_kernel_itself_refuses_what_it_cannot_do():
    x, b, mean, rstd = inputs(3, 4, 5)
    for message, arguments in [
        (r"\[N, T, D\]", (x[0], b[0], mean, rstd)),
        (r"\[N, T, D\]", (x, b[:, :3], mean, rstd)),
        ("dtype", (x, b.float(), mean, rstd)),
        (r"\[N, T\]", (x, b, mean[:2], rstd)),
        (r"\[N, T\]", (x, b, None, rstd[:, :3])),
        (r"\[N, T\]", (x, b, mean.float(), rstd)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)


def test_opcheck():
    torch.library.opcheck(ops._persample_layer_norm, inputs(*SHAPES[-1], torch.float64))
