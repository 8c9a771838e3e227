"""persample_layer_norm and persample_group_norm in Triton, by its interpreter: run by test_persample_affine.py."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.triton_kernels import affine_sums, persample_tiles, strided_sums
from kdaif_fast.triton_kernels.persample_group_norm import persample_group_norm
from kdaif_fast.triton_kernels.persample_layer_norm import persample_layer_norm
from tests.triton_kernels.persample_cases import DTYPES, assert_close, expected, strided

LAYERS = [(1, 1, 1), (3, 4, 16), (2, 5, 17), (1, 9, 200), (4, 70, 70), (2, 3, 1), (5, 1, 130)]  # N, T, D
GROUPS = [(1, 1, 1, 1), (3, 6, 16, 6), (2, 6, 49, 1), (2, 8, 196, 4), (1, 2, 700, 2), (4, 6, 1, 3), (2, 70, 3, 35)]


def layer(N, T, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, b = (torch.randn(N, T, D, generator=generator).to(dtype) for _ in range(2))
    return x, b, torch.randn(N, T, generator=generator), torch.rand(N, T, generator=generator) + 0.5


def group(N, C, L, groups, dtype=torch.float32):
    x, b, _, _ = layer(N, C, L, dtype)
    return x, b, *layer(N, groups, 1)[2:]


def check(function, x, b, mean, rstd):
    ours = function(x, b, mean, rstd)
    wanted = reference(function.__name__, x, b, mean, rstd)
    for mine, truth in zip(ours, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, truth, 4e-6)
    return ours


def reference(name, x, b, mean, rstd):
    if mean is None:
        return expected(name, x, b, torch.zeros_like(rstd), rstd)
    return expected(name, x, b, mean, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("has_mean", [True, False])
def test_layer_norm(shape, dtype, has_mean):
    x, b, mean, rstd = layer(*shape, dtype)
    check(persample_layer_norm, x, b, mean if has_mean else None, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GROUPS)
def test_group_norm(shape, dtype):
    check(persample_group_norm, *group(*shape, dtype))


@pytest.mark.parametrize("shape", [(2, 9000, 3), (1, 700, 130)])
def test_layer_norm_in_parts(shape):
    N, T, D = shape
    launch = affine_sums.launch_for(N, D, T, strided_sums.ROWS_ARE_FAST, 1)
    assert launch.parts > 1
    assert T % (launch.part * launch.columns)  # the last one is short
    check(persample_layer_norm, *layer(*shape))


def test_group_norm_in_parts():
    assert affine_sums.launch_for(2, 6, 5000, strided_sums.COLUMNS_ARE_FAST, 8).parts > 1
    check(persample_group_norm, *group(2, 6, 5000, 2))


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "with gaps": strided,
    "samples second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("other", ["same", "contiguous"])
@pytest.mark.parametrize("which", ["layer", "group"])
@pytest.mark.parametrize("size", [48, 50])  # with and without vectors
def test_strides(which, how, other, size):
    function = persample_layer_norm if which == "layer" else persample_group_norm
    x, b, mean, rstd = layer(3, 20, size) if which == "layer" else group(3, 20, size, 4)
    view = LAYOUTS[how](x)
    assert view.stride() != x.stride()
    check(function, view, LAYOUTS[how](b) if other == "same" else b, mean.t().contiguous().t(), rstd)
    check(function, x, view, mean, rstd)


def test_expanded():
    """The gradient of a mean over positions, the statistics of a batch norm, a scale without a norm."""
    x, b, mean, rstd = group(3, 8, 50, 8)
    check(persample_group_norm, x, b[:, :, :1].expand_as(b), mean[:1].expand(3, -1), rstd[:1].expand(3, -1))
    check(persample_group_norm, x, b[:, :, :1].expand_as(b), mean, rstd)
    x, b, _, _ = layer(3, 20, 50)
    check(persample_layer_norm, x, b, None, x.new_ones(1, 1).expand(3, 20))


def test_a_large_mean_costs_no_digits():
    x, b, mean, rstd = layer(3, 40, 70)
    check(persample_layer_norm, (x + 4096).round(decimals=2), b, mean.mul(0).add(4096), rstd)
    x, b, mean, rstd = group(3, 6, 70, 2)
    check(persample_group_norm, (x + 4096).round(decimals=2), b, mean.mul(0).add(4096), rstd)


@pytest.mark.parametrize("function", [persample_layer_norm, persample_group_norm])
def test_nothing_to_sum(function):
    for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        x, b, mean, rstd = layer(*shape)
        of_groups = (mean[:, :1], rstd[:, :1]) if function is persample_group_norm else (mean, rstd)
        for result in function(x, b, *of_groups):
            assert torch.equal(result, torch.zeros(shape[0], shape[2 if function is persample_layer_norm else 1]))


def test_a_sample_keeps_its_nan_to_itself():
    x, b, mean, rstd = layer(4, 9, 70)
    before = persample_layer_norm(x, b, mean, rstd)
    x[1], mean[1] = torch.inf, torch.nan
    ours = persample_layer_norm(x, b, mean, rstd)
    assert ours[0][1].isnan().all()
    assert all(torch.equal(mine[[0, 2, 3]], same[[0, 2, 3]]) for mine, same in zip(ours, before, strict=True))


def test_samples_and_rows_far_apart():
    """Offsets that 32 bits do not hold. What lies between is never touched, so takes no memory."""
    x, b, mean, rstd = layer(2, 3, 20, torch.float16)
    same = persample_layer_norm(x, b, mean, rstd)
    for strides in ((2**31, 20, 1), (2**32, 2**31 - 2**23, 1)):
        memory = torch.empty(strides[0] + 2 * strides[1] + 20, dtype=torch.float16)
        view = memory.as_strided((2, 3, 20), strides)
        view.copy_(x)
        assert all(
            torch.equal(mine, s) for mine, s in zip(persample_layer_norm(view, b, mean, rstd), same, strict=True)
        )


def test_more_samples_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(strided_sums, "MOST_PROGRAMS", 3)
    check(persample_layer_norm, *layer(5, 4, 70))
    check(persample_group_norm, *group(5, 4, 70, 2))


def test_forced_through_the_op():
    for name, arguments in (("persample_layer_norm", layer(3, 4, 20)), ("persample_group_norm", group(3, 4, 20, 2))):
        op = getattr(kdaif_fast.ops, name)
        with kdaif_fast.backend("triton"):
            forced = op(*arguments)
            double = op(*(x.double() for x in arguments))  # the reference answers
        for mine, other, truth in zip(forced, double, expected(name, *arguments), strict=True):
            assert_close(mine, truth, 4e-6)
            assert other.dtype == torch.float64
            assert_close(other, truth, 1e-12)


def test_this_is_the_interpreter():
    assert persample_tiles.interpreted()
