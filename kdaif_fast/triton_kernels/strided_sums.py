"""What the Triton kernels that read two tensors once and sum their products share: tiles, alignment, launches.

A tile has rows and columns, whichever of them memory has side by side. Vector loads of 16 bytes need to be known to be
aligned when a kernel is compiled, and Triton only asks whether a number is 1 or a multiple of 16; images of 14 x 14
positions are not. So kernels are told a power of two that divides every stride and every length that matters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import parts_for

ELEMENTS, WARPS = 4096, 8  # of a tile at most: 16 elements a thread of both tensors in flight
UNALIGNED_ELEMENTS = 2048  # where every element needs an offset and a mask of its own, which take registers
NARROW = 64  # the fast side of a tile where the other side has enough: 128 bytes of a half-precision type
LONG = 512  # where it is the fast side that is summed over: fewer sums at the end, and more programs
MOST_PROGRAMS = 2**31 - 1
ROWS_ARE_FAST, COLUMNS_ARE_FAST, NONE_IS_FAST = range(3)


@triton.jit
def aligned(number, ALIGNMENT: tl.constexpr):
    """The same number, known to be a multiple."""
    return number // ALIGNMENT * ALIGNMENT


@triton.jit
def offsets(rows, columns, row_stride, column_stride, FAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Of a tile's elements: [rows, columns]."""
    if FAST == 0:
        at = rows[:, None] + columns[None, :] * aligned(column_stride, ALIGNMENT)
    elif FAST == 1:
        at = rows[:, None] * aligned(row_stride, ALIGNMENT) + columns[None, :]
    else:
        at = rows[:, None] * row_stride + columns[None, :] * column_stride
    return at


class Plane(NamedTuple):
    """Two axes of a tensor, as its strides have them, beside those that count whole tiles."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int
    others: tuple[int, ...]  # strides from one plane to the next

    @property
    def fast(self) -> int:
        """Along which of them neighbours lie side by side."""
        if self.column_stride == 1 and self.columns > 1:
            return COLUMNS_ARE_FAST
        if self.row_stride == 1 and self.rows > 1:
            return ROWS_ARE_FAST
        return COLUMNS_ARE_FAST if self.column_stride == 1 else NONE_IS_FAST

    @property
    def alignment(self) -> int:
        """A power of two, 16 at most, that divides where every run of neighbours starts and how long it is."""
        if self.fast == NONE_IS_FAST:
            return math.gcd(16, *self.others)
        rows_are_fast = self.fast == ROWS_ARE_FAST
        lengths = (self.rows, self.column_stride) if rows_are_fast else (self.columns, self.row_stride)
        return math.gcd(16, *lengths, *self.others)


def common_alignment(left: Plane, right: Plane) -> int:
    """Of both."""
    return math.gcd(left.alignment, right.alignment)


def mask_alignments(left: Plane, right: Plane) -> tuple[int, int]:
    """Of the numbers of rows and of columns: that of the loads where neighbours lie along them."""
    alignment = common_alignment(left, right)
    fast = (left.fast, right.fast)
    return alignment if ROWS_ARE_FAST in fast else 1, alignment if COLUMNS_ARE_FAST in fast else 1


class Tile(NamedTuple):
    """Its sides, along what memory has side by side and along the other axis, and how many warps it keeps busy."""

    fast: int
    other: int
    warps: int


def tile_for(fast: int, other: int, wanted: int, alignment: int) -> Tile:
    """A tile over [fast, other] elements: on the fast side as long as wanted, longer if the other side is short."""
    fast, other = triton.next_power_of_2(max(fast, 1)), triton.next_power_of_2(max(other, 1))
    most = ELEMENTS if alignment > 1 else UNALIGNED_ELEMENTS
    width = min(fast, max(wanted, most // other), most)
    height = min(other, most // width)
    return Tile(width, height, min(max(width * height * WARPS // most, 1), WARPS))


class Parts(NamedTuple):
    """Into how many parts a sum is cut, and how many tiles are in one."""

    number: int
    tiles: int


def parts_of_sum(tiles: int, programs: int) -> Parts:
    """Parts enough for a GPU to be busy, each of four tiles at least."""
    size = triton.cdiv(tiles, parts_for(tiles, programs, 4))
    return Parts(triton.cdiv(tiles, size), size)


def sample_ranges(samples: int, programs: int) -> list[tuple[int, int]]:
    """Ranges of samples, of so many programs each, that one launch can take: mostly one."""
    step = max(MOST_PROGRAMS // programs, 1)
    return [(start, min(start + step, samples)) for start in range(0, samples, step)]


def samples_of(x: Tensor, start: int, stop: int, axis: int = 0) -> Tensor:
    """Those of a range: mostly all."""
    return x if stop - start == x.shape[axis] else x.narrow(axis, start, stop - start)


def plane_of(x: Tensor, row_axis: int, column_axis: int) -> Plane:
    """Two axes of a tensor; the others are counted."""
    others = tuple(x.stride(i) for i in range(x.dim()) if i not in (row_axis, column_axis) and x.shape[i] > 1)
    return Plane(x.shape[row_axis], x.shape[column_axis], x.stride(row_axis), x.stride(column_axis), others)
