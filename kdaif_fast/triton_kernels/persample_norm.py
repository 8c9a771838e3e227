"""persample_norm in Triton: ||G_i||^2, G_i = sum_t b_it a_it^T, without storing a G_i.

One position: ||a||^2 ||b||^2, read once. Several: either the Gram matrices A A^T and B B^T of a sample's positions, a
tile of both at a time, multiplied and summed (they are symmetric: tiles below the diagonal count twice, those above are
not formed); or tiles of G_i itself, squared and summed. The one with fewer operations is taken. A program writes one
number; a second stage adds those of a sample. Where one tile holds all of a sample's positions it is loaded once. No
atomics: results repeat bit for bit.

Floor: N T (I + O) elements read, and N T min(T (I + O), 2 I O) operations, but for the halves of tiles on the diagonal.
Memory: 4 bytes for each tile of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import (
    Product,
    even,
    extent,
    for_offsets,
    gradient_tile,
    index_type,
    on_device_of,
    product_of,
    square_candidates,
    square_side,
    tuned,
)


@triton.jit
def _squares(row, there, size, feature, SAMPLES: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of the squares of each row's elements, [SAMPLES]."""
    total = tl.zeros((SAMPLES,), tl.float32)
    for start in range(0, size, WIDTH):
        at = start + tl.arange(0, WIDTH)
        mask = there[:, None] & (at < size)[None, :]
        x = tl.load(row[:, None] + at.to(tl.int64)[None, :] * feature, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    return total


@triton.jit
def _one_position_kernel(
    inputs,  # [N, I]
    output_grads,  # [N, O]
    norms,  # [N], float32
    N,
    features,
    outputs,
    a_sample,  # strides
    a_feature,
    b_sample,
    b_feature,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    there = sample < N
    of_a = _squares(inputs + sample * a_sample, there, features, a_feature, SAMPLES, WIDTH)
    of_b = _squares(output_grads + sample * b_sample, there, outputs, b_feature, SAMPLES, WIDTH)
    tl.store(norms + sample, of_a * of_b, mask=there)


@triton.jit
def _gram_tile(
    x,  # [T, size] of a sample
    row,  # [BLOCK]: the tile's rows, and its columns
    column,
    T,
    size,
    position,  # strides
    feature,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    EVEN: tl.constexpr,  # divides `size`
    WHOLE: tl.constexpr,  # the tile is all there is, so that its rows are its columns
):
    tile = tl.zeros((BLOCK, BLOCK), tl.float32)
    of_row = x + row.to(INDEX) * position
    of_column = x + column.to(INDEX) * position
    for start in range(0, size, DEPTH):
        at = start + tl.arange(0, DEPTH)
        there = at < size
        offset = at.to(INDEX) * feature
        left_there, right_there = (row < T)[:, None], (column < T)[None, :]
        if EVEN % DEPTH != 0:
            left_there &= there[None, :]
            right_there &= there[:, None]
        left = tl.load(of_row[:, None] + offset[None, :], mask=left_there, other=0.0)
        if WIDE:
            left = left.to(tl.float32)
        if WHOLE:
            right = left.trans()
        else:
            right = tl.load(of_column[None, :] + offset[:, None], mask=right_there, other=0.0)
            if WIDE:
                right = right.to(tl.float32)
        tile = tl.dot(left, right, tile, input_precision=PRECISION)
    return tile


@triton.jit
def _gram_kernel(
    inputs,  # [N, T, I]
    output_grads,  # [N, T, O]
    partial,  # [N, tiles], float32
    T,
    features,
    outputs,
    tiles,  # on and below the diagonal
    a_sample,  # strides
    a_position,
    a_feature,
    b_sample,
    b_position,
    b_feature,
    ROWS: tl.constexpr,  # positions on a side; COLUMNS are as many
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    EVEN_OUTPUTS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    # Row r of tiles begins at r (r + 1) / 2. The root is off by 1 at most where float32 has not all digits.
    r = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > tile, r - 1, r)
    r = tl.where((r + 1) * (r + 2) // 2 <= tile, r + 1, r)
    c = tile - r * (r + 1) // 2
    row = r * ROWS + tl.arange(0, ROWS)
    column = c * ROWS + tl.arange(0, ROWS)
    a = inputs + sample * a_sample
    b = output_grads + sample * b_sample
    of_a = _gram_tile(
        a, row, column, T, features, a_position, a_feature, ROWS, DEPTH, WIDE, PRECISION, INDEX, EVEN_FEATURES, WHOLE
    )
    of_b = _gram_tile(
        b, row, column, T, outputs, b_position, b_feature, ROWS, DEPTH, WIDE, PRECISION, INDEX, EVEN_OUTPUTS, WHOLE
    )
    total = tl.sum(tl.sum(of_a * of_b, 1), 0)
    tl.store(partial + sample * tiles + tile, tl.where(r == c, total, 2.0 * total))


@triton.jit
def _gradient_kernel(
    inputs,  # [N, T, I]
    output_grads,  # [N, T, O]
    partial,  # [N, tiles], float32
    T,
    features,
    outputs,
    tiles,
    a_sample,  # strides
    a_position,
    a_feature,
    b_sample,
    b_position,
    b_feature,
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
    wide = tl.cdiv(features, COLUMNS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = (tile // wide * ROWS + tl.arange(0, ROWS)).to(INDEX)
    i = (tile % wide * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)
    a = inputs + sample * a_sample
    b = output_grads + sample * b_sample
    gradient = gradient_tile(
        a, b, a, 0, T, T, o, i, outputs, features, a_sample, a_position, a_feature, b_sample, b_position, b_feature, 0,
        False, ROWS, COLUMNS, DEPTH, WIDE, PRECISION, INDEX, EVEN_T, EVEN_OUTPUTS, EVEN_FEATURES,
    )  # fmt: skip
    tl.store(partial + sample * tiles + tile, tl.sum(tl.sum(gradient * gradient, 1), 0))


def gram_tiles(T: int, block: int) -> int:
    """Tiles on and below the diagonal of [T, T]."""
    side = triton.cdiv(T, block)
    return side * (side + 1) // 2


def gram_is_cheaper(T: int, features: int, outputs: int, block: int = 64) -> bool:
    """Whether Gram matrices take fewer multiplications than the gradient, in tiles as both are formed."""
    return gram_tiles(T, block) * block**2 * (features + outputs) <= T * features * outputs


def _of_one_position(inputs: Tensor, output_grads: Tensor) -> Tensor:
    N, _, features = inputs.shape
    outputs = output_grads.shape[2]
    norms = torch.empty(N, dtype=torch.float32, device=inputs.device)
    width = min(triton.next_power_of_2(max(features, outputs)), 1024)
    samples = min(max(1024 // width, 1), 16)
    with on_device_of(inputs):
        _one_position_kernel[(triton.cdiv(N, samples),)](
            inputs,
            output_grads,
            norms,
            N,
            features,
            outputs,
            inputs.stride(0),
            inputs.stride(2),
            output_grads.stride(0),
            output_grads.stride(2),
            SAMPLES=samples,
            WIDTH=width,
            num_warps=4,
        )
    return norms


def _by_gram(inputs: Tensor, output_grads: Tensor, product: Product) -> Tensor:
    N, T, features = inputs.shape
    outputs = output_grads.shape[2]
    block = square_side(T, product)
    tiles = gram_tiles(T, block)
    partial = torch.empty((N, tiles), dtype=torch.float32, device=inputs.device)
    blocks = square_candidates(block, max(features, outputs), product)
    kernel = tuned(_gram_kernel, blocks, ("T", "features", "outputs", "PRECISION"))
    with on_device_of(inputs):
        kernel[(N * tiles,)](
            inputs,
            output_grads,
            partial,
            T,
            features,
            outputs,
            tiles,
            *inputs.stride(),
            *output_grads.stride(),
            WIDE=product.wide,
            PRECISION=product.precision,
            INDEX=index_type(extent(inputs, 0), extent(output_grads, 0)),
            EVEN_OUTPUTS=even(outputs, (b.depth for b in blocks)),
            EVEN_FEATURES=even(features, (b.depth for b in blocks)),
            WHOLE=tiles == 1,
        )
    return partial.sum(1)


def _by_gradient(inputs: Tensor, output_grads: Tensor, product: Product) -> Tensor:
    N, T, features = inputs.shape
    outputs = output_grads.shape[2]
    side = square_side(max(outputs, features), product)
    blocks = square_candidates(side, T, product)
    tiles = triton.cdiv(outputs, side) * triton.cdiv(features, side)
    partial = torch.empty((N, tiles), dtype=torch.float32, device=inputs.device)
    kernel = tuned(_gradient_kernel, blocks, ("T", "features", "outputs", "PRECISION"))
    with on_device_of(inputs):
        kernel[(N * tiles,)](
            inputs,
            output_grads,
            partial,
            T,
            features,
            outputs,
            tiles,
            *inputs.stride(),
            *output_grads.stride(),
            WIDE=product.wide,
            PRECISION=product.precision,
            INDEX=index_type(extent(inputs, 0), extent(output_grads, 0)),
            EVEN_T=even(T, (b.depth for b in blocks)),
            EVEN_OUTPUTS=even(outputs, [side]),
            EVEN_FEATURES=even(features, [side]),
        )
    return partial.sum(1)


def persample_norm(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """[N, T, I], [N, T, O] -> [N], float32: the squares of the norms. Any strides; float32, bfloat16, float16."""
    N, T, features = inputs.shape
    outputs = output_grads.shape[2]
    if 0 in (N, T, features, outputs):
        return torch.zeros(N, dtype=torch.float32, device=inputs.device)
    if T == 1:
        return _of_one_position(inputs, output_grads)
    index = index_type(extent(inputs, 0), extent(output_grads, 0))
    product = for_offsets(product_of(inputs, output_grads), index)
    if gram_is_cheaper(T, features, outputs, max(square_side(T, product), 64)):
        return _by_gram(inputs, output_grads, product)
    return _by_gradient(inputs, output_grads, product)
