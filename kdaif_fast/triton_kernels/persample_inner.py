"""persample_inner in Triton: both tensors are read once, in place, whatever order memory has their axes in.

Axes that both tensors have next to each other are taken as one, so that mostly one is left; where the tensors differ
(channels last against channels first) two are, and a program reads tiles. A program owns a part of one sample's sum; a
second stage adds parts where the samples alone would leave a GPU idle. No atomics: results repeat bit for bit.

Floor: bytes, N (K + 1) numbers of *S read (the right tensor K times, out of the caches all but once). Not run on a GPU
yet; tests/triton_kernels says what was checked without one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import extent, index_type, on_device_of
from .strided_sums import (
    LONG,
    NARROW,
    Plane,
    aligned,
    common_alignment,
    mask_alignments,
    offsets,
    parts_of_sum,
    sample_ranges,
    samples_of,
    tile_for,
)


@triton.jit(do_not_specialize=["parts", "part"])
def _inner_kernel(
    left,  # [N, K, rows, columns]
    right,  # [N, rows, columns]
    sums,  # [parts, N, K], float32, dense
    samples,
    K,
    rows,
    columns,
    parts,
    part,  # tiles of a part, of those of one sample
    left_sample,  # strides
    left_direction,
    left_row,
    left_column,
    right_sample,
    right_row,
    right_column,
    sums_part,
    LEFT_FAST: tl.constexpr,
    RIGHT_FAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    COLUMN_ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    # Directions of one part of a sample run at the same time and share what they read of the right tensor.
    k = (tl.program_id(0) % K).to(tl.int64)
    which = (tl.program_id(0) // K % parts).to(tl.int64)
    sample = (tl.program_id(0) // K // parts).to(tl.int64)
    rows = aligned(rows, ROW_ALIGNMENT)
    columns = aligned(columns, COLUMN_ALIGNMENT)
    left += sample * aligned(left_sample, ALIGNMENT) + k * aligned(left_direction, ALIGNMENT)
    right += sample * aligned(right_sample, ALIGNMENT)
    wide = tl.cdiv(columns, COLUMNS)
    first = which * part
    last = tl.minimum(first + part, tl.cdiv(rows, ROWS).to(tl.int64) * wide)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(first, last):
        r = ((tile // wide) * ROWS).to(INDEX) + tl.arange(0, ROWS).to(INDEX)
        c = ((tile % wide) * COLUMNS).to(INDEX) + tl.arange(0, COLUMNS).to(INDEX)
        there = (r < rows)[:, None] & (c < columns)[None, :]
        at = offsets(r, c, left_row, left_column, LEFT_FAST, ALIGNMENT)
        x = tl.load(left + at, mask=there, other=0.0).to(tl.float32)
        at = offsets(r, c, right_row, right_column, RIGHT_FAST, ALIGNMENT)
        y = tl.load(right + at, mask=there, other=0.0).to(tl.float32)
        total += x * y
    tl.store(sums + which * sums_part + sample * K + k, tl.sum(tl.sum(total, 1), 0))


def planes(left: Tensor, right: Tensor) -> tuple[Plane, Plane] | None:
    """The summed axes as two at most, in the order of the left tensor's memory; None if that takes more."""
    axes = sorted(
        ((left.stride(i + 1), right.stride(i), right.shape[i]) for i in range(1, right.dim()) if right.shape[i] != 1),
        reverse=True,
    )
    merged: list[tuple[int, int, int]] = []
    for inner in axes:
        if merged and all(merged[-1][i] == inner[i] * inner[2] for i in range(2)):
            inner = (inner[0], inner[1], inner[2] * merged.pop()[2])
        merged.append(inner)
    if len(merged) > 2:
        return None
    merged = [(0, 0, 1)] * (2 - len(merged)) + merged
    if merged[1][2] == 1:  # one number a sample
        merged[1] = (1, 1, 1)
    (left_row, right_row, rows), (left_column, right_column, columns) = merged
    counted = [left.stride(i) for i in range(2) if left.shape[i] > 1]
    return (
        Plane(rows, columns, left_row, left_column, tuple(counted)),
        Plane(rows, columns, right_row, right_column, (right.stride(0),) if len(right) > 1 else ()),
    )


def persample_inner(left: Tensor, right: Tensor) -> Tensor:
    """[N, K, *S], [N, *S] -> [N, K], float32. Any strides; float32, bfloat16, float16."""
    N, K = left.shape[:2]
    if 0 in left.shape:
        return torch.zeros((N, K), dtype=torch.float32, device=left.device)
    found = planes(left, right)
    if found is None:
        left, right = left.contiguous(), right.contiguous()
        found = planes(left, right)
        assert found is not None
    x, y = found
    alignment = common_alignment(x, y)
    tile = tile_for(x.columns, x.rows, NARROW if x.fast != y.fast else LONG, alignment)
    parts = parts_of_sum(triton.cdiv(x.rows, tile.other) * triton.cdiv(x.columns, tile.fast), N * K)
    sums = torch.empty((parts.number, N, K), dtype=torch.float32, device=left.device)
    row_alignment, column_alignment = mask_alignments(x, y)
    with on_device_of(left):
        for start, stop in sample_ranges(N, K * parts.number):
            _inner_kernel[((stop - start) * K * parts.number,)](
                samples_of(left, start, stop),
                samples_of(right, start, stop),
                samples_of(sums, start, stop, 1),
                stop - start,
                K,
                x.rows,
                x.columns,
                *parts,
                left.stride(0) if N > 1 else 0,
                left.stride(1) if K > 1 else 0,
                x.row_stride,
                x.column_stride,
                right.stride(0) if N > 1 else 0,
                y.row_stride,
                y.column_stride,
                N * K,
                LEFT_FAST=x.fast,
                RIGHT_FAST=y.fast,
                ALIGNMENT=alignment,
                ROW_ALIGNMENT=row_alignment,
                COLUMN_ALIGNMENT=column_alignment,
                ROWS=tile.other,
                COLUMNS=tile.fast,
                INDEX=index_type(extent(left[0], 0), extent(right, 0)),
                num_warps=tile.warps,
            )
    return sums[0] if parts.number == 1 else sums.sum(0)
