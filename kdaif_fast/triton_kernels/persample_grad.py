"""persample_grad in Triton: each sample's G_i = sum_t b_it a_it^T.

A program owns a tile of one sample's G and sums over the sample's positions. One position: an outer product, which
needs no sum and no tensor core.

Floor: N O I elements written and N T (I + O) read, 2 N T O I operations. For few positions it is bound by the writing.
Memory: the result alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .persample_tiles import (
    block_for,
    candidates,
    even,
    extent,
    for_offsets,
    gradient_tile,
    in_groups,
    index_type,
    interpreted,
    on_device_of,
    product_of,
    tuned,
)


@triton.jit
def _outer_product_kernel(
    inputs,  # [N, I]
    output_grads,  # [N, O]
    grads,  # [N, O, I], dense
    features,
    outputs,
    a_sample,  # strides
    a_feature,
    b_sample,
    b_feature,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    wide = tl.cdiv(features, COLUMNS)
    tiles = tl.cdiv(outputs, ROWS) * wide
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = (tile // wide * ROWS + tl.arange(0, ROWS)).to(INDEX)
    i = (tile % wide * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)
    a = tl.load(inputs + sample * a_sample + i * a_feature, mask=i < features, other=0.0).to(tl.float32)
    b = tl.load(output_grads + sample * b_sample + o * b_feature, mask=o < outputs, other=0.0).to(tl.float32)
    grads += sample * outputs * features
    tl.store(
        grads + (o[:, None] * features + i[None, :]),
        b[:, None] * a[None, :],
        mask=(o < outputs)[:, None] & (i < features)[None, :],
    )


@triton.jit
def _persample_grad_kernel(
    inputs,  # [N, T, I]
    output_grads,  # [N, T, O]
    grads,  # [N, O, I], dense
    T,
    features,
    outputs,
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
    wide, high = tl.cdiv(features, COLUMNS), tl.cdiv(outputs, ROWS)
    tiles = high * wide
    # Programs that run at the same time share their sample, so that its A and B are read from memory once.
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = in_groups(tl.program_id(0) % tiles, high, wide)
    o = (row * ROWS + tl.arange(0, ROWS)).to(INDEX)
    i = (column * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)
    a = inputs + sample * a_sample
    b = output_grads + sample * b_sample
    gradient = gradient_tile(
        a, b, a, 0, T, T, o, i, outputs, features, a_sample, a_position, a_feature, b_sample, b_position, b_feature, 0,
        False, ROWS, COLUMNS, DEPTH, WIDE, PRECISION, INDEX, EVEN_T, EVEN_OUTPUTS, EVEN_FEATURES,
    )  # fmt: skip
    grads += sample * outputs * features
    tl.store(
        grads + (o[:, None] * features + i[None, :]), gradient, mask=(o < outputs)[:, None] & (i < features)[None, :]
    )


def outer_product_blocks(outputs: int, features: int) -> tuple[int, int]:
    """Rows and columns of a tile of one outer product: some thousand elements, as much of a row as fits."""
    most = 1024 if interpreted() else 4096
    columns = block_for(features, 512)
    return block_for(outputs, most // columns), columns


def _of_one_position(inputs: Tensor, output_grads: Tensor, grads: Tensor) -> None:
    N, outputs, features = grads.shape
    rows, columns = outer_product_blocks(outputs, features)
    with on_device_of(inputs):
        _outer_product_kernel[(N * triton.cdiv(outputs, rows) * triton.cdiv(features, columns),)](
            inputs,
            output_grads,
            grads,
            features,
            outputs,
            inputs.stride(0),
            inputs.stride(2),
            output_grads.stride(0),
            output_grads.stride(2),
            ROWS=rows,
            COLUMNS=columns,
            INDEX=index_type(outputs * features, extent(inputs, 0), extent(output_grads, 0)),
            num_warps=max(rows * columns // 1024, 1),
        )


def persample_grad(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """[N, T, I], [N, T, O] -> [N, O, I] in the inputs' dtype. Any strides; float32, bfloat16, float16."""
    N, T, features = inputs.shape
    outputs = output_grads.shape[2]
    grads = torch.empty((N, outputs, features), dtype=inputs.dtype, device=inputs.device)
    if 0 in (N, T, features, outputs):
        return grads.zero_()
    if T == 1:
        _of_one_position(inputs, output_grads, grads)
        return grads
    product = product_of(inputs, output_grads)
    index = index_type(outputs * features, extent(inputs, 0), extent(output_grads, 0))
    blocks = candidates(outputs, features, T, for_offsets(product, index), N)
    kernel = tuned(_persample_grad_kernel, blocks, ("T", "features", "outputs", "PRECISION"))
    with on_device_of(inputs):
        kernel[lambda chosen: (N * triton.cdiv(outputs, chosen["ROWS"]) * triton.cdiv(features, chosen["COLUMNS"]),)](
            inputs,
            output_grads,
            grads,
            T,
            features,
            outputs,
            *inputs.stride(),
            *output_grads.stride(),
            WIDE=product.wide,
            PRECISION=product.precision,
            INDEX=index,
            EVEN_T=even(T, (b.depth for b in blocks)),
            EVEN_OUTPUTS=even(outputs, (b.rows for b in blocks)),
            EVEN_FEATURES=even(features, (b.columns for b in blocks)),
        )
    return grads
