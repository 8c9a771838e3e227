"""weighted_grad in Triton: sum_i w_i sum_t b_it a_it^T, a matrix product over all samples' positions.

A program owns a tile of the result and a part of the positions. Where T divides into steps, a sample's positions are
summed first, and the sum is weighted: the matrix units read both operands as they were loaded. It takes the registers
of two tiles, so the largest tile, and any for other T, has b weighted as it is loaded. No weighted copy of B exists.
Where the tiles alone would leave a GPU idle, the positions are cut into parts, whose sums a second stage adds. No
atomics: results repeat bit for bit.

Overhead over the plain product, estimated from a Hopper's instructions, not measured: of a sample at a time, some 180
instructions a warp and a wait for the matrix units, for each T / 64 steps of 512 clocks: a tenth at T = 512, more than
half at T = 64. Of weights on load, 300 instructions a step of 1024 clocks in place of 100, issued twice by each
scheduler: hidden only where they overlap with the product. Which is faster is found out by timing both.

w b is rounded to bfloat16 where it is weighted on load, as it is in the gradient of a weighted loss. float16 is widened
and multiplied in TF32, which has float16's digits: weights such as 1 / N would push gradients out of float16's range.
TF32's units sum over what lies side by side, which positions do not: elements are loaded one by one, and a Hopper is
far from its rate.

Floor: 2 N T O I operations; N T (I + O) elements read. Memory: the result, and 4 O I bytes a part where there are
several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import (
    ENOUGH_PROGRAMS,
    MOST_OF_TWO,
    MULTIPROCESSORS,
    Blocks,
    Product,
    candidates,
    even,
    extent,
    for_offsets,
    gradient_tile,
    in_groups,
    index_type,
    on_device_of,
    product_of,
    tuned,
)

SMALLEST_PART = 512  # positions
LONG_SAMPLE = 256  # positions, from which to weight whole samples is guessed to be faster
PART_COST = 700  # 128 KB of traffic at 17 bytes a clock, over the 11 clocks that a position of a 128 x 128 tile takes


@triton.jit(do_not_specialize=["parts", "part"])
def _weighted_grad_kernel(
    inputs,  # [N, T, I]
    output_grads,  # [N, T, O]
    weights,  # [N]
    sums,  # [parts, O, I], dense
    positions,  # N T
    T,
    features,
    outputs,
    parts,
    part,  # positions of a part
    a_sample,  # strides
    a_position,
    a_feature,
    b_sample,
    b_position,
    b_feature,
    weight_stride,
    ROWS: tl.constexpr,  # outputs
    COLUMNS: tl.constexpr,  # inputs
    DEPTH: tl.constexpr,  # positions
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_OUTPUTS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
):
    wide, high = tl.cdiv(features, COLUMNS), tl.cdiv(outputs, ROWS)
    # Programs that run at the same time share their positions, so that A and B are read from memory once.
    which = (tl.program_id(0) // (high * wide)).to(tl.int64)
    row, column = in_groups(tl.program_id(0) % (high * wide), high, wide)
    o = (row * ROWS + tl.arange(0, ROWS)).to(INDEX)
    i = (column * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)
    # Positions are counted from the part's first sample on: 32 bits hold a part, though perhaps not N T.
    start = which * part
    sample = start // T
    first = (start - sample * T).to(tl.int32)
    last = first + tl.minimum(part, positions - start).to(tl.int32)
    sum_of_part = gradient_tile(
        inputs + sample * a_sample, output_grads + sample * b_sample, weights + sample * weight_stride, first, last, T,
        o, i, outputs, features, a_sample, a_position, a_feature, b_sample, b_position, b_feature, weight_stride,
        True, ROWS, COLUMNS, DEPTH, WIDE, PRECISION, INDEX, EVEN_T, EVEN_OUTPUTS, EVEN_FEATURES,
    )  # fmt: skip
    sums += which * outputs * features
    tl.store(
        sums + (o[:, None] * features + i[None, :]), sum_of_part, mask=(o < outputs)[:, None] & (i < features)[None, :]
    )


class Parts(NamedTuple):
    """Into how many parts the positions are cut, and how many are in one."""

    number: int
    positions: int


def parts_of_positions(positions: int, outputs: int, features: int, elements: int) -> Parts:
    """Parts that keep a GPU busy to the end, and so many that 32 bits hold an offset within one.

    A part's tile costs as much as PART_COST positions: it is written, read again and added.
    """
    tiles = triton.cdiv(outputs, 128) * triton.cdiv(features, 128)

    def cost(number: int) -> float:
        rounds = triton.cdiv(tiles * number, MULTIPROCESSORS)
        return rounds * (positions / number + (PART_COST if number > 1 else 0))

    most = max(min(positions // SMALLEST_PART, ENOUGH_PROGRAMS), 1)
    wanted = max(min(range(1, most + 1), key=cost), triton.cdiv(elements, 2**30))
    size = triton.cdiv(triton.cdiv(positions, wanted), 64) * 64
    return Parts(triton.cdiv(positions, size), size)


def product_of_weighted(inputs: Tensor, output_grads: Tensor) -> Product:
    """As product_of, but for float16, whose range w b may leave."""
    product = product_of(inputs, output_grads)
    return (
        product._replace(wide=True, precision="tf32")
        if inputs.dtype == output_grads.dtype == torch.float16
        else product
    )


def sample_by_sample_first(blocks: tuple[Blocks, ...], T: int) -> tuple[Blocks, ...]:
    """The blocks with those first that weight sums of whole samples, if that happens rarely enough."""

    def comes_later(b: Blocks) -> bool:
        return T < LONG_SAMPLE or T % b.depth != 0 or b.rows * b.columns > MOST_OF_TWO.value

    return tuple(sorted(blocks, key=comes_later))


def weighted_grad(inputs: Tensor, output_grads: Tensor, weights: Tensor) -> Tensor:
    """[N, T, I], [N, T, O], [N] -> [O, I] in the inputs' dtype. Any strides; float32, bfloat16, float16."""
    N, T, features = inputs.shape
    outputs = output_grads.shape[2]
    if 0 in (N, T, features, outputs):
        return torch.zeros((outputs, features), dtype=inputs.dtype, device=inputs.device)
    elements = max(extent(inputs, N), extent(output_grads, N))
    parts = parts_of_positions(N * T, outputs, features, elements)
    # One part is rounded once, as it is stored.
    dtype = inputs.dtype if parts.number == 1 else torch.float32
    sums = torch.empty((parts.number, outputs, features), dtype=dtype, device=inputs.device)
    product = product_of_weighted(inputs, output_grads)
    samples_of_part = min(N, triton.cdiv(parts.positions, T) + 1)
    index = index_type(outputs * features, *[extent(x, samples_of_part) for x in (inputs, output_grads, weights)])
    blocks = candidates(outputs, features, parts.positions, for_offsets(product, index), parts.number)
    kernel = tuned(_weighted_grad_kernel, sample_by_sample_first(blocks, T), ("features", "outputs", "PRECISION"))
    with on_device_of(inputs):
        kernel[
            lambda chosen: (
                parts.number * triton.cdiv(outputs, chosen["ROWS"]) * triton.cdiv(features, chosen["COLUMNS"]),
            )
        ](
            inputs,
            output_grads,
            weights,
            sums,
            N * T,
            T,
            features,
            outputs,
            *parts,
            *inputs.stride(),
            *output_grads.stride(),
            weights.stride(0),
            WIDE=product.wide,
            PRECISION=product.precision,
            INDEX=index,
            EVEN_T=even(T, (b.depth for b in blocks)),
            EVEN_OUTPUTS=even(outputs, (b.rows for b in blocks)),
            EVEN_FEATURES=even(features, (b.columns for b in blocks)),
        )
    return sums[0] if parts.number == 1 else sums.sum(0).to(inputs.dtype)
