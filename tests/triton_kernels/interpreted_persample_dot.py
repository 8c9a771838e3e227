"""persample_dot in Triton, run by its interpreter: by test_persample_dot.py, with TRITON_INTERPRET=1 set."""

import pytest
import torch

import kdaif_fast
from kdaif_fast.triton_kernels import persample_tiles
from kdaif_fast.triton_kernels.persample_dot import parts_of_direction, persample_dot, sums_over_outputs
from tests.triton_kernels.persample_cases import (
    DTYPES,
    SHAPES,
    assert_close,
    directions,
    expected,
    far_apart,
    inputs,
    strided,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_against_reference(dtype, shape, outputs, count):
    a, b = inputs(shape, outputs, dtype)
    v = directions(count, outputs, shape[2], dtype)
    ours = persample_dot(a, b, v)
    assert ours.dtype == torch.float32
    assert_close(ours, expected("persample_dot", a, b, v))


def test_a_direction_in_parts():
    """A wide layer and few samples: parts of both its sides, whose last ones are short."""
    a, b = inputs((3, 2, 300), 290, torch.float32)
    v = directions(2, 290, 300, torch.float32)
    parts = parts_of_direction(6, 300, 290, 2)
    assert min(parts.over_outputs, parts.over_features) >= 2
    assert 290 % parts.rows
    assert 300 % parts.columns
    assert_close(persample_dot(a, b, v), expected("persample_dot", a, b, v))


def test_dtypes_may_differ():
    a, b = inputs((4, 3, 20), 18, torch.bfloat16)
    v = directions(2, 18, 20, torch.float32)
    assert_close(persample_dot(a, b.half(), v), expected("persample_dot", a, b.half(), v))


def test_wide_directions_of_bfloat16():
    """As the sum of two: nearly all of float32's digits, where one would have 8 of 24."""
    a, b = inputs((4, 3, 20), 18, torch.bfloat16)
    v = directions(2, 18, 20, torch.float32)
    assert_close(persample_dot(a, b, v), expected("persample_dot", a, b, v), 2**-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_outputs_than_features(dtype):
    a, b = inputs((3, 5, 20), 70, dtype)
    v = directions(2, 70, 20, dtype)
    assert sums_over_outputs(20, 70)
    assert_close(persample_dot(a, b, v), expected("persample_dot", a, b, v))


def test_strides_and_broadcasts():
    a, b = inputs((5, 3, 20), 18, torch.float32)
    v = directions(2, 18, 20, torch.float32)
    same = persample_dot(a, b, v)
    assert torch.equal(persample_dot(strided(a), strided(b), strided(v)), same)
    shared = a[:1].expand(5, 3, 20)
    assert torch.equal(persample_dot(shared, b, v[:1].expand(2, 18, 20)), persample_dot(shared.clone(), b, v[[0, 0]]))


def test_samples_far_apart():
    a, b = inputs((3, 2, 20), 18, torch.float16)
    v = directions(1, 18, 20, torch.float16)
    assert torch.equal(persample_dot(far_apart(a), b, v), persample_dot(a, b, v))


def test_nothing_to_sum():
    for N, T, features, outputs, count in (
        (0, 1, 2, 3, 1),
        (2, 0, 2, 3, 1),
        (2, 1, 0, 3, 1),
        (2, 1, 2, 0, 1),
        (2, 1, 2, 3, 0),
    ):
        a, b = torch.ones(N, T, features), torch.ones(N, T, outputs)
        assert torch.equal(persample_dot(a, b, torch.ones(count, outputs, features)), torch.zeros(N, count))


def test_a_sample_keeps_its_nan_to_itself():
    a, b = inputs((4, 3, 20), 18, torch.float32)
    v = directions(2, 18, 20, torch.float32)
    same = persample_dot(a, b, v)
    a[2, 1, 5] = torch.nan
    ours = persample_dot(a, b, v)
    assert ours[2].isnan().all()
    assert torch.equal(ours[[0, 1, 3]], same[[0, 1, 3]])


def test_forced_through_the_op():
    a, b = inputs((4, 3, 20), 18, torch.float32)
    v = directions(2, 18, 20, torch.float32)
    with kdaif_fast.backend("triton"):
        assert torch.equal(torch.ops.kdaif_fast.persample_dot(a, b, v), persample_dot(a, b, v))
        wide = torch.ops.kdaif_fast.persample_dot(a.double(), b.double(), v.double())  # the reference answers
    torch.testing.assert_close(wide, expected("persample_dot", a, b, v))


def test_this_is_the_interpreter():
    assert persample_tiles.interpreted()
