"""The Triton kernel of persample_inner without a GPU: run by Triton's interpreter, and how it is launched."""

import itertools
import math

import pytest
import torch

from .without_a_gpu import run_under_the_interpreter

pytest.importorskip("triton")

from kdaif_fast.triton_kernels import strided_sums
from kdaif_fast.triton_kernels.persample_inner import planes
from kdaif_fast.triton_kernels.strided_sums import (
    COLUMNS_ARE_FAST,
    MOST_PROGRAMS,
    NONE_IS_FAST,
    ROWS_ARE_FAST,
    Plane,
    common_alignment,
    mask_alignments,
    parts_of_sum,
    plane_of,
    sample_ranges,
    tile_for,
)


def test_under_the_interpreter():
    run_under_the_interpreter("interpreted_persample_inner.py")


def test_axes_that_both_tensors_have_next_to_each_other_are_one():
    left, right = torch.empty(2, 3, 8, 5, 6, device="meta"), torch.empty(2, 8, 5, 6, device="meta")
    x, y = planes(left, right)
    assert (x.rows, x.columns, x.fast, y.fast) == (1, 240, COLUMNS_ARE_FAST, COLUMNS_ARE_FAST)
    assert (x.others, y.others) == ((720, 240), (240,))
    last = right.contiguous(memory_format=torch.channels_last)
    x, y = planes(left, last)
    assert (x.rows, x.columns, x.fast, y.fast) == (8, 30, COLUMNS_ARE_FAST, ROWS_ARE_FAST)
    assert planes(left[:, :1].contiguous(), last[:, :, ::2]) is None
    assert planes(torch.empty(2, 1, 1), torch.empty(2, 1)) is not None


def test_alignment_divides_every_run_of_neighbours():
    for shape in ((4, 64, 3136), (4, 256, 196), (4, 512, 49), (3, 5, 24)):
        x = torch.empty(shape, device="meta")
        plane = plane_of(x, 1, 2)
        assert plane.fast == COLUMNS_ARE_FAST
        assert plane.alignment == math.gcd(16, shape[2])
        turned = plane_of(x.mT, 1, 2)
        assert (turned.fast, turned.alignment) == (ROWS_ARE_FAST, plane.alignment)
        assert common_alignment(plane, turned) == plane.alignment
        assert mask_alignments(plane, plane) == (1, plane.alignment)
        assert mask_alignments(plane, turned) == (plane.alignment, plane.alignment)
    apart = torch.empty(4, 8, 64, device="meta")[:, :, ::2]
    assert plane_of(apart, 1, 2).fast == NONE_IS_FAST
    assert mask_alignments(plane_of(apart, 1, 2), plane_of(apart, 1, 2)) == (1, 1)
    assert Plane(1, 32, 0, 1, (36,)).alignment == 4  # where samples start counts, too


def test_tiles():
    for fast in (1, 7, 49, 196, 3136, 10**6):
        for other in (1, 3, 64, 5000):
            for alignment, most in ((1, strided_sums.UNALIGNED_ELEMENTS), (8, strided_sums.ELEMENTS)):
                tile = tile_for(fast, other, 64, alignment)
                assert tile.fast * tile.other <= most
                assert tile.fast < 2 * fast
                assert tile.other < 2 * other
                assert tile.fast * tile.other == most or (tile.fast >= fast and tile.other >= other)
                assert 1 <= tile.warps <= strided_sums.WARPS
    assert tile_for(768, 512, 64, 16) == (64, 64, 8)
    assert tile_for(768, 1, 64, 16) == (1024, 1, 2)


def test_parts():
    for tiles, programs in ((1, 1), (1000, 1), (7, 10**6), (10**6, 5)):
        parts = parts_of_sum(tiles, programs)
        assert (parts.number - 1) * parts.tiles < tiles <= parts.number * parts.tiles
    assert parts_of_sum(7, 10**6).number == 1
    assert parts_of_sum(1000, 1).number == 250


def test_launches_of_more_samples_than_a_grid_has_programs():
    assert sample_ranges(300, 12) == [(0, 300)]
    ranges = sample_ranges(2**33, 3)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 2**33
    assert all(one[1] == following[0] for one, following in itertools.pairwise(ranges))
    assert all((stop - start) * 3 <= MOST_PROGRAMS for start, stop in ranges)
