"""persample_dot in Triton: <G_i, V_k> = sum_t b_it^T V_k a_it as a matrix product A V_k^T that is never stored.

A program owns a block of positions (rows of A, of as many samples as they belong to), one direction, and a part of V_k.
It forms tiles of A V_k^T, multiplies each by b's and sums over the layer's outputs. What is left is one number for each
position, direction and part: a second stage adds those of a sample. No atomics: results repeat bit for bit.

Floor: 2 K N T I O operations; A, b and V read once: N T (I + O) + K O I elements, which cost less than the operations
where N T and O exceed some hundreds. Memory: 4 K N T bytes for each part of V_k, of at least 128 of its rows; with TF32
a copy of V where what is summed over is not contiguous; for float32 directions of bfloat16 tensors, V in bfloat16
twice.

What ends a tile (b loaded, multiplied, summed over columns) costs some 1000 clocks beside 16 for each of the I terms
that it sums, in bfloat16 on a Hopper: an estimate from its instructions, a twelfth at I = 768. Where O is at least 2 I,
V b^T is formed instead, and a takes b's place. The end of a tile stands before the next one's product: Triton then sums
it in the layout that the matrix units leave it in, and a quarter at a time needs few registers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import (
    IN_FULL,
    MULTIPROCESSORS,
    WIDEST,
    candidates,
    even,
    extent,
    for_offsets,
    in_groups,
    index_type,
    on_device_of,
    parts_for,
    product_of,
    tuned,
)

SMALLEST_PART = 128  # of a direction's rows or columns
MANY_PROGRAMS = 8 * MULTIPROCESSORS  # so many that the last of them to run leave little idle


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's four blocks of columns, each in the registers that it is in already."""
    even, odd = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, 2, COLUMNS // 4)), (0, 3, 1, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["parts_of_outputs", "parts_of_features"])
def _persample_dot_kernel(
    inputs,  # [N, T, I]
    output_grads,  # [N, T, O]
    directions,  # [K, O, I]
    partial,  # [K, parts, N T], float32
    positions,  # N T
    T,
    features,
    outputs,
    K,
    parts_of_outputs,
    parts_of_features,
    part_of_outputs,  # rows of a part
    part_of_features,
    a_sample,  # strides
    a_position,
    a_feature,
    b_sample,
    b_position,
    b_feature,
    v_direction,
    v_output,
    v_feature,
    ROWS: tl.constexpr,  # positions
    COLUMNS: tl.constexpr,  # outputs
    DEPTH: tl.constexpr,  # inputs
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    EVEN_OUTPUTS: tl.constexpr,  # divides the outputs of every part
    EVEN_FEATURES: tl.constexpr,
):
    all_columns: tl.constexpr = EVEN_OUTPUTS % COLUMNS == 0  # tiles end where parts do: nothing to mask
    all_depth: tl.constexpr = EVEN_FEATURES % DEPTH == 0
    parts = parts_of_outputs * parts_of_features
    block, piece = in_groups(tl.program_id(0), tl.cdiv(positions, ROWS), K * parts)
    part = piece % parts
    first_o = part // parts_of_features * part_of_outputs
    last_o = tl.minimum(first_o + part_of_outputs, outputs)
    first_i = part % parts_of_features * part_of_features
    last_i = tl.minimum(first_i + part_of_features, features)

    # Positions are counted from the first sample's first on, so that offsets within a tile are small.
    first = block.to(tl.int64) * ROWS
    first_sample = first // T
    inputs += first_sample * a_sample
    output_grads += first_sample * b_sample
    at = (first - first_sample * T).to(tl.int32) + tl.arange(0, ROWS)
    there = first + tl.arange(0, ROWS) < positions
    sample = at // T
    position = (at - sample * T).to(INDEX)
    sample = sample.to(INDEX)
    directions += (piece // parts).to(tl.int64) * v_direction

    a_row = sample * a_sample + position * a_position
    column = tl.arange(0, COLUMNS // 4)
    b_at = (sample * b_sample + position * b_position)[:, None] + column.to(INDEX)[None, :] * b_feature

    total = tl.zeros((ROWS,), tl.float32)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start_o in range(first_o, last_o + COLUMNS, COLUMNS):
        if start_o > first_o:
            quarters = _quarters(product, ROWS, COLUMNS)
            for quarter in tl.static_range(4):
                offset = start_o - COLUMNS + quarter * (COLUMNS // 4)
                b = tl.load(
                    output_grads + offset.to(INDEX) * b_feature + b_at,
                    mask=there[:, None] if all_columns else there[:, None] & (column < last_o - offset)[None, :],
                    other=0.0,
                )
                total += tl.sum(quarters[quarter] * b.to(tl.float32), 1)
        o = start_o + tl.arange(0, COLUMNS)
        o_there = o < last_o
        v_column = o.to(INDEX)[None, :] * v_output
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start_i in range(first_i, tl.where(start_o < last_o, last_i, first_i), DEPTH):
            i = start_i + tl.arange(0, DEPTH)
            i_there = i < last_i
            a = tl.load(
                inputs + (a_row[:, None] + i.to(INDEX)[None, :] * a_feature),
                mask=there[:, None] if all_depth else there[:, None] & i_there[None, :],
                other=0.0,
            )
            v_from = directions + (i.to(INDEX)[:, None] * v_feature + v_column)
            if all_depth and all_columns:
                v = tl.load(v_from)
            else:
                v = tl.load(v_from, mask=i_there[:, None] & o_there[None, :], other=0.0)
            if WIDE:
                a = a.to(tl.float32)
                v = v.to(tl.float32)
            product = tl.dot(a, v, product, input_precision=PRECISION)
    tl.store(partial + piece.to(tl.int64) * positions + first + tl.arange(0, ROWS), total, mask=there)


class Parts(NamedTuple):
    """Into how many parts a direction's rows and columns are cut, and how many are in one."""

    over_outputs: int
    over_features: int
    rows: int
    columns: int


def parts_of_direction(positions: int, features: int, outputs: int, K: int) -> Parts:
    """Parts enough for a GPU to be busy to the end: of rows first, as they cost 4 bytes a position and nothing else."""
    programs = triton.cdiv(positions, 128) * K
    wide = WIDEST if programs * (outputs // WIDEST) >= MULTIPROCESSORS else SMALLEST_PART

    def size(whole: int, parts: int, multiple: int) -> int:
        return triton.cdiv(triton.cdiv(whole, parts), multiple) * multiple  # whole blocks, but for the last part

    rows = size(outputs, max(min(triton.cdiv(MANY_PROGRAMS, programs), outputs // wide), 1), wide)
    over_outputs = triton.cdiv(outputs, rows)
    columns = size(features, parts_for(features, programs * over_outputs, SMALLEST_PART), 64)
    return Parts(over_outputs, triton.cdiv(features, columns), rows, columns)


def sums_over_outputs(features: int, outputs: int) -> bool:
    """Whether b^T V is the better half of the product: what ends a tile costs as much as about 64 terms of its sums."""
    return outputs >= 2 * features


def persample_dot(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """[N, T, I], [N, T, O], [K, O, I] -> [N, K], float32. Any strides; float32, bfloat16 and float16 in any mixture.

    float32 directions of bfloat16 tensors are multiplied as the sum of two bfloat16 ones, which has 16 of 24 digits and
    takes twice the time; in float32 it would take ten times as long.
    """
    N, T, features = inputs.shape
    K, outputs, _ = directions.shape
    if 0 in (N, T, features, outputs, K):
        return torch.zeros((N, K), dtype=torch.float32, device=inputs.device)
    if directions.dtype == torch.float32 and inputs.dtype == output_grads.dtype == torch.bfloat16:
        high = directions.bfloat16()
        low = (directions - high).bfloat16()
        both = _of_dense(inputs, output_grads, torch.cat((high, low)))
        return both[:, :K] + both[:, K:]
    return _of_dense(inputs, output_grads, directions)


def _of_dense(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """The same of tensors of no size 0, whose product is formed in one dtype."""
    if sums_over_outputs(inputs.shape[2], output_grads.shape[2]):
        inputs, output_grads, directions = output_grads, inputs, directions.mT
    N, T, features = inputs.shape
    K, outputs, _ = directions.shape
    product = product_of(inputs, directions)
    if product.precision == "tf32":
        directions = directions.contiguous()  # what TF32's units sum over has to lie side by side
    positions = N * T
    parts = parts_of_direction(positions, features, outputs, K)
    number = parts.over_outputs * parts.over_features
    partial = torch.empty((K, number, N, T), dtype=torch.float32, device=inputs.device)
    samples_of_tile = min(N, triton.cdiv(WIDEST, T) + 1)
    extents = [extent(inputs, samples_of_tile), extent(output_grads, samples_of_tile), extent(directions, 0)]
    index = index_type(*extents)
    every_rows, every_columns = math.gcd(outputs, parts.rows), math.gcd(features, parts.columns)  # divide all parts
    blocks = candidates(positions, parts.rows, parts.columns, for_offsets(product, index), K * number)
    # Beside the largest tiles there is no room for masks in registers.
    largest = SMALLEST_PART if product.blocks == IN_FULL else WIDEST
    blocks = tuple(b for b in blocks if b.columns < largest or every_rows % b.columns == every_columns % b.depth == 0)
    kernel = tuned(_persample_dot_kernel, blocks, ("features", "outputs", "PRECISION"))
    with on_device_of(inputs):
        kernel[lambda chosen: (triton.cdiv(positions, chosen["ROWS"]) * K * number,)](
            inputs,
            output_grads,
            directions,
            partial,
            positions,
            T,
            features,
            outputs,
            K,
            *parts,
            *inputs.stride(),
            *output_grads.stride(),
            *directions.stride(),
            WIDE=product.wide,
            PRECISION=product.precision,
            INDEX=index,
            EVEN_OUTPUTS=even(every_rows, (b.columns for b in blocks)),
            EVEN_FEATURES=even(every_columns, (b.depth for b in blocks)),
        )
    if number == T == 1 and K == 1:
        return partial.view(N, K)
    dots = partial.new_empty(N, K)
    torch.sum(partial, (1, 3), out=dots.t())
    return dots
