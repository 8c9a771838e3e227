"""persample_dot in Triton: <G_i, V_k> = sum_t b_it^T V_k a_it as a matrix product A V_k^T that is never stored.

A program owns a block of positions (rows of A, of as many samples as they belong to), one direction, and a part of V_k.
It forms tiles of A V_k^T, multiplies each by b's and sums over the layer's outputs. What is left is one number for each
position, direction and part: a second stage adds those of a sample. No atomics: results repeat bit for bit.

Floor: 2 K N T I O operations; A, b and V read once: N T (I + O) + K O I elements, which cost less than the operations
where N T and O exceed some hundreds. Memory: 4 K N T bytes for each part of V_k; it is cut only where there are few
positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import candidates, extent, index_type, on_device_of, parts_for, product_of, tuned

SMALLEST_PART = 128  # of a direction's rows or columns


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
):
    parts = parts_of_outputs * parts_of_features
    # Programs that run at the same time share their positions, so that A is read from memory once.
    block = tl.program_id(0) // (K * parts)
    piece = tl.program_id(0) % (K * parts)
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
    a_row = inputs + (sample * a_sample + position * a_position)
    b_row = output_grads + (sample * b_sample + position * b_position)
    direction = directions + (piece // parts).to(tl.int64) * v_direction

    total = tl.zeros((ROWS,), tl.float32)
    for start_o in range(first_o, last_o, COLUMNS):
        o = start_o + tl.arange(0, COLUMNS)
        o_there = o < last_o
        o = o.to(INDEX)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start_i in range(first_i, last_i, DEPTH):
            i = start_i + tl.arange(0, DEPTH)
            i_there = i < last_i
            i = i.to(INDEX)
            a = tl.load(a_row[:, None] + i[None, :] * a_feature, mask=there[:, None] & i_there[None, :], other=0.0)
            v = tl.load(
                direction + (i[:, None] * v_feature + o[None, :] * v_output),
                mask=i_there[:, None] & o_there[None, :],
                other=0.0,
            )
            if WIDE:
                a = a.to(tl.float32)
                v = v.to(tl.float32)
            product = tl.dot(a, v, product, input_precision=PRECISION)
        b = tl.load(b_row[:, None] + o[None, :] * b_feature, mask=there[:, None] & o_there[None, :], other=0.0)
        total += tl.sum(product * b.to(tl.float32), 1)
    tl.store(partial + piece.to(tl.int64) * positions + first + tl.arange(0, ROWS), total, mask=there)


class Parts(NamedTuple):
    """Into how many parts a direction's rows and columns are cut, and how many are in one."""

    over_outputs: int
    over_features: int
    rows: int
    columns: int


def parts_of_direction(positions: int, features: int, outputs: int, K: int) -> Parts:
    """Parts enough for a GPU to be busy; rows first, as a part of these reads no more of A V^T than it needs."""
    programs = triton.cdiv(positions, 64) * K
    over_outputs = parts_for(outputs, programs, SMALLEST_PART)
    over_features = parts_for(features, programs * over_outputs, SMALLEST_PART)

    def size(whole: int, parts: int) -> int:
        return triton.cdiv(triton.cdiv(whole, parts), 32) * 32  # whole blocks, but for the last part

    rows, columns = size(outputs, over_outputs), size(features, over_features)
    return Parts(triton.cdiv(outputs, rows), triton.cdiv(features, columns), rows, columns)


def persample_dot(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """[N, T, I], [N, T, O], [K, O, I] -> [N, K], float32. Any strides; float32, bfloat16 and float16 in any mixture."""
    N, T, features = inputs.shape
    K, outputs, _ = directions.shape
    if 0 in (N, T, features, outputs, K):
        return torch.zeros((N, K), dtype=torch.float32, device=inputs.device)
    positions = N * T
    parts = parts_of_direction(positions, features, outputs, K)
    pieces = K * parts.over_outputs * parts.over_features
    partial = torch.empty(
        (K, parts.over_outputs * parts.over_features, N, T), dtype=torch.float32, device=inputs.device
    )
    product = product_of(inputs, directions)
    blocks = candidates(positions, parts.rows, parts.columns, product)
    kernel = tuned(_persample_dot_kernel, blocks, ("features", "outputs", "PRECISION"))
    samples_of_tile = min(N, triton.cdiv(max(b.rows for b in blocks), T) + 1)
    extents = [extent(inputs, samples_of_tile), extent(output_grads, samples_of_tile), extent(directions, 0)]
    with on_device_of(inputs):
        kernel[lambda chosen: (triton.cdiv(positions, chosen["ROWS"]) * pieces,)](
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
            INDEX=index_type(*extents),
        )
    return partial.sum((1, 3)).t().contiguous()
