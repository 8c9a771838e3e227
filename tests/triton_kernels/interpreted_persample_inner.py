"""persample_inner in Triton, run by its interpreter: by test_persample_inner.py, with TRITON_INTERPRET=1 set."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.triton_kernels import persample_tiles, strided_sums
from kdaif_fast.triton_kernels.persample_inner import persample_inner, planes
from tests.triton_kernels.persample_cases import DTYPES, assert_close, expected

SHAPES = [(1, 1, 1), (3, 5), (2, 7, 6, 5), (3, 16, 8, 8), (2, 3, 4, 5, 6), (2, 9000)]  # N, *S


def tensors(shape, K=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(shape[0], K, *shape[1:], generator=generator)
    return left.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def check(left, right):
    ours = persample_inner(left, right)
    assert ours.dtype == torch.float32
    assert_close(ours, expected("persample_inner", left, right), 4e-6)
    return ours


def channels_last(x, first):
    """[..., C, *S] with the channels side by side."""
    return x.movedim(first, -1).contiguous().movedim(-1, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("K", [1, 3])
def test_against_definition(shape, K, dtype):
    check(*tensors(shape, K, dtype))


@pytest.mark.parametrize("shape", [(2, 7, 6, 5), (3, 16, 8, 8), (2, 3, 4, 5, 6), (2, 130, 9, 8)])
@pytest.mark.parametrize("K", [1, 3])
def test_memory_formats(shape, K):
    left, right = tensors(shape, K)
    for x in (left, channels_last(left, 2)):
        for y in (right, channels_last(right, 1)):
            assert planes(x, y) is not None  # in place
            check(x, y)


def test_directions_among_the_channels():
    """What a convolution with stacked directions gives, channels first and last, with groups and without."""
    for groups in (1, 2):
        z, right = torch.randn(3, 2 * 6, 5, 4), torch.randn(3, 6, 5, 4)
        for memory in (z, channels_last(z, 1)):
            left = memory.unflatten(1, (groups, 2, 6 // groups)).transpose(1, 2)
            assert planes(left, right.unflatten(1, (groups, -1))) is not None or (groups == 2 and memory is not z)
            check(left, right.unflatten(1, (groups, -1)))


def test_what_takes_more_than_two_axes_is_copied():
    left, right = tensors((2, 8, 6, 10))
    left, right = left[..., :5, 1::2], right[:, :, :5, :5]
    assert planes(left, right) is None
    check(left, right)


def test_parts_and_their_short_last_one():
    left, right = tensors((2, 20 * 4096 + 5), 1)
    check(left, right)
    left, right = tensors((1, 70, 1500), 1)
    check(left, channels_last(right, 1))


def test_expanded():
    left, right = tensors((3, 4, 5))
    check(left, right[:, :, :1].expand(3, 4, 5))
    check(left[:, :1].expand(3, 2, 4, 5), right)
    check(left, right[:1].expand(3, 4, 5))


def test_nothing_to_sum():
    for shape, K in (((0, 3), 2), ((2, 0), 2), ((2, 3), 0)):
        assert torch.equal(persample_inner(*tensors(shape, K)), torch.zeros(shape[0], K))


def test_far_apart():
    left, right = tensors((2, 40), 1, torch.float16)
    memory = torch.empty(2**31 + 40, dtype=torch.float16)
    view = memory.as_strided(right.shape, (2**31, 1))
    view.copy_(right)
    assert torch.equal(persample_inner(left, view), persample_inner(left, right))
    rows = memory[: 2**31 + 20].as_strided((1, 2, 20), (0, 2**31, 1))
    rows.copy_(right[:1].view(1, 2, 20))
    left = left[:1].view(1, 1, 2, 20)
    assert torch.equal(persample_inner(left, rows), persample_inner(left, right[:1].view(1, 2, 20)))


def test_a_sample_keeps_its_nan_to_itself():
    left, right = tensors((3, 4, 50))
    before = persample_inner(left, right)
    right[1, 2, 3] = torch.nan
    ours = persample_inner(left, right)
    assert ours[1].isnan().all()
    assert torch.equal(ours[[0, 2]], before[[0, 2]])


def test_more_samples_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(strided_sums, "MOST_PROGRAMS", 5)
    check(*tensors((5, 70)))


def test_forced_through_the_op():
    left, right = tensors((3, 4, 5))
    with kdaif_fast.backend("triton"):
        assert torch.equal(torch.ops.kdaif_fast.persample_inner(left, right), persample_inner(left, right))
        double = torch.ops.kdaif_fast.persample_inner(left.double(), right.double())  # the reference answers
    torch.testing.assert_close(double, expected("persample_inner", left, right))


def test_this_is_the_interpreter():
    assert persample_tiles.interpreted()
