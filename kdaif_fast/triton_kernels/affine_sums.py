"""Per-sample gradients of a normalisation's scale and shift in Triton: sums of b x_hat and of b, in one pass over both.

A program owns a block of features (or channels) of one sample and a part of the positions. It keeps a tile of partial
sums in registers and adds it up at its end; where the blocks alone would leave a GPU idle, the positions are cut into
parts, whose sums a second stage adds. No atomics: results repeat bit for bit. x is centred before it is multiplied, so
that a large mean costs no digits.

Floor: bytes, inputs and output_grads read once and [N, D] written twice. Not run on a GPU yet; tests/triton_kernels
says what was checked without one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import extent, index_type, on_device_of
from .strided_sums import (
    COLUMNS_ARE_FAST,
    LONG,
    NARROW,
    ROWS_ARE_FAST,
    aligned,
    common_alignment,
    mask_alignments,
    offsets,
    parts_of_sum,
    plane_of,
    sample_ranges,
    samples_of,
    tile_for,
)


@triton.jit(do_not_specialize=["part", "blocks", "samples"])
def _affine_sums_kernel(
    inputs,  # [N, kept, summed], in any order
    output_grads,  # likewise
    mean,  # [N, groups of kept] if STATISTIC_OF_KEPT, else [N, summed]; read if HAS_MEAN
    rstd,  # likewise
    sums,  # [parts, 2, N, kept], float32: of b x_hat, of b
    kept,
    summed,
    group,  # of how many of kept a statistic is
    blocks,  # of kept
    part,  # tiles of a part, of those along summed
    samples,  # of sums
    x_sample,  # strides
    x_kept,
    x_summed,
    b_sample,
    b_kept,
    b_summed,
    mean_sample,
    mean_next,
    rstd_sample,
    rstd_next,
    HAS_MEAN: tl.constexpr,
    STATISTIC_OF_KEPT: tl.constexpr,
    X_FAST: tl.constexpr,
    B_FAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    COLUMN_ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,  # of kept
    COLUMNS: tl.constexpr,  # of summed
    INDEX: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    which = tl.program_id(1).to(tl.int64)
    kept = aligned(kept, ROW_ALIGNMENT)
    positions = aligned(summed, COLUMN_ALIGNMENT)
    inputs += sample * aligned(x_sample, ALIGNMENT)
    output_grads += sample * aligned(b_sample, ALIGNMENT)
    mean += sample * mean_sample
    rstd += sample * rstd_sample
    r = (block * ROWS).to(INDEX) + tl.arange(0, ROWS).to(INDEX)
    centre = tl.zeros((ROWS,), tl.float32)
    scale = tl.zeros((ROWS,), tl.float32)
    if STATISTIC_OF_KEPT:
        if HAS_MEAN:
            centre = tl.load(mean + (r // group).to(tl.int64) * mean_next, mask=r < kept, other=0.0).to(tl.float32)
        scale = tl.load(rstd + (r // group).to(tl.int64) * rstd_next, mask=r < kept, other=0.0).to(tl.float32)
    of_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_shift = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = which * part
    last = tl.minimum(first + part, tl.cdiv(summed, COLUMNS))
    for tile in range(first, last):
        c = (tile * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)
        there = (r < kept)[:, None] & (c < positions)[None, :]
        at = offsets(r, c, x_kept, x_summed, X_FAST, ALIGNMENT)
        x = tl.load(inputs + at, mask=there, other=0.0).to(tl.float32)
        at = offsets(r, c, b_kept, b_summed, B_FAST, ALIGNMENT)
        b = tl.load(output_grads + at, mask=there, other=0.0).to(tl.float32)
        if STATISTIC_OF_KEPT:
            of_scale += b * (x - centre[:, None])
        else:
            if HAS_MEAN:
                x -= tl.load(mean + c.to(tl.int64) * mean_next, mask=c < positions, other=0.0).to(tl.float32)[None, :]
            r_hat = tl.load(rstd + c.to(tl.int64) * rstd_next, mask=c < positions, other=0.0).to(tl.float32)
            of_scale += b * (x * r_hat[None, :])
        of_shift += b
    total = tl.sum(of_scale, 1)
    if STATISTIC_OF_KEPT:
        total *= scale
    sums += (which * 2 * samples + sample) * kept + r
    tl.store(sums, total, mask=r < kept)
    tl.store(sums + samples.to(tl.int64) * kept, tl.sum(of_shift, 1), mask=r < kept)


class Launch(NamedTuple):
    """How one is cut: blocks of kept of a sample, parts of summed and their tiles, a tile's sides and its warps."""

    blocks: int
    parts: int
    part: int
    rows: int
    columns: int
    warps: int


def launch_for(samples: int, kept: int, summed: int, fast: int, alignment: int) -> Launch:
    """Tiles along what memory has side by side; parts where blocks are few."""
    if fast == ROWS_ARE_FAST:
        rows, columns, warps = tile_for(kept, summed, NARROW, alignment)
    else:
        columns, rows, warps = tile_for(summed, kept, LONG, alignment)
    blocks = triton.cdiv(kept, rows)
    parts = parts_of_sum(triton.cdiv(summed, columns), samples * blocks)
    return Launch(blocks, parts.number, parts.tiles, rows, columns, warps)


def affine_sums(
    inputs: Tensor, output_grads: Tensor, mean: Tensor | None, rstd: Tensor, kept_axis: int, group: int | None
) -> tuple[Tensor, Tensor]:
    """[N, ., .] with the kept axis 1 or 2 -> sums of b x_hat and of b over the other one: [N, kept], float32.

    Statistics belong to groups of so many along the kept axis, or (None) to what is summed over.
    """
    summed_axis = 3 - kept_axis
    N, kept, summed = inputs.shape[0], inputs.shape[kept_axis], inputs.shape[summed_axis]
    if inputs.numel() == 0:
        zeros = torch.zeros((2, N, kept), dtype=torch.float32, device=inputs.device)
        return zeros[0], zeros[1]
    x, b = (plane_of(t, kept_axis, summed_axis) for t in (inputs, output_grads))
    fast = x.fast if x.fast == b.fast else COLUMNS_ARE_FAST
    alignment = common_alignment(x, b)
    launch = launch_for(N, kept, summed, fast, alignment)
    sums = torch.empty((launch.parts, 2, N, kept), dtype=torch.float32, device=inputs.device)
    centre = rstd if mean is None else mean
    row_alignment, column_alignment = mask_alignments(x, b)
    sample_strides = [t.stride(0) if N > 1 else 0 for t in (inputs, output_grads, centre, rstd)]
    with on_device_of(inputs):
        for start, stop in sample_ranges(N, launch.blocks):
            _affine_sums_kernel[((stop - start) * launch.blocks, launch.parts)](
                samples_of(inputs, start, stop),
                samples_of(output_grads, start, stop),
                samples_of(centre, start, stop),
                samples_of(rstd, start, stop),
                samples_of(sums, start, stop, 2),
                kept,
                summed,
                1 if group is None else group,
                launch.blocks,
                launch.part,
                N,
                sample_strides[0],
                x.row_stride,
                x.column_stride,
                sample_strides[1],
                b.row_stride,
                b.column_stride,
                sample_strides[2],
                centre.stride(1),
                sample_strides[3],
                rstd.stride(1),
                HAS_MEAN=mean is not None,
                STATISTIC_OF_KEPT=group is not None,
                X_FAST=x.fast,
                B_FAST=b.fast,
                ALIGNMENT=alignment,
                ROW_ALIGNMENT=row_alignment,
                COLUMN_ALIGNMENT=column_alignment,
                ROWS=launch.rows,
                COLUMNS=launch.columns,
                INDEX=index_type(extent(inputs, 0), extent(output_grads, 0), summed),
                num_warps=launch.warps,
            )
    total = sums[0] if launch.parts == 1 else sums.sum(0)
    return total[0], total[1]
