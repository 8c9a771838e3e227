"""What the Triton kernels of per-sample gradients share: a tile of sum_t b_t a_t^T, its blocks, and its launch.

Products of float16 and bfloat16 are formed on tensor cores from the elements as they are and summed in float32. float32
is multiplied as torch's setting for matrix products says: in full by default, on tensor cores where TF32 is allowed.
None of these kernels has run on a GPU yet; tests/triton_kernels says what was checked without one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

ENOUGH_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100; more than that for smaller GPUs
MOST_REGISTERS = 255  # where the assembler left to itself would spill a little to have more threads at once
NARROWEST = 16  # of a side of a product that tensor cores form


class Blocks(NamedTuple):
    """One configuration: the tile's two sides, the elements of the summed side that are loaded at a time, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most; None: as many as the assembler thinks right


# None of these spills on sm_80 and sm_90 (tests/triton_kernels). Where nothing says that elements can be loaded several
# at a time, each needs an offset and a mask of its own, and tiles are smaller.
IN_FULL = (Blocks(64, 64, 16, 4, 2, MOST_REGISTERS), Blocks(128, 64, 16, 8, 2, MOST_REGISTERS))
TF32 = (Blocks(64, 64, 32, 4, 3), Blocks(128, 64, 32, 8, 3))
NARROW = (Blocks(64, 64, 32, 4, 3), Blocks(128, 64, 32, 8, 3), Blocks(128, 128, 32, 8, 3))
ONE_BY_ONE = (Blocks(32, 32, 32, 4, 2),)
INTERPRETED = (Blocks(32, 32, 32, 4, 1),)  # a program costs milliseconds, however small


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """The device that a launch goes to."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Product(NamedTuple):
    """How tl.dot multiplies: elements widened to float32 or as they are, how float32 is, and how they are loaded."""

    wide: bool
    precision: str
    vectors: bool = True

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """All configurations to choose from."""
        if interpreted():
            return INTERPRETED
        if not self.vectors:
            return ONE_BY_ONE
        return NARROW if not self.wide else TF32 if self.precision == "tf32" else IN_FULL


def product_of(*operands: Tensor) -> Product:
    """The product of tensors of one or several dtypes; what differs is widened."""
    dtypes = {x.dtype for x in operands}
    wide = len(dtypes) > 1 or torch.float32 in dtypes
    allows_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    # The interpreter cannot multiply bfloat16, and rounds as nobody does; float32 holds every product exactly.
    return Product(
        wide or interpreted(), "tf32" if allows_tf32 and wide else "ieee", all(map(loads_in_vectors, operands))
    )


def loads_in_vectors(x: Tensor) -> bool:
    """Whether neighbours lie side by side along one dimension, and the other strides are multiples of 16."""
    strides = [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]
    return 1 in strides and all(s == 1 or s % 16 == 0 for s in strides) and x.data_ptr() % 16 == 0


def extent(x: Tensor, samples: int) -> int:
    """How many elements from the first one to beyond the last one of so many samples of x."""
    return samples * abs(x.stride(0)) + sum(n * abs(s) for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))


def index_type(*extents: int) -> Any:
    """What holds a tile's offsets. 64 bits would take twice the registers, and spill where strides are odd."""
    return tl.int32 if max(extents) < 2**31 - 2**24 else tl.int64  # a block reaches past an end, masked


def candidates(rows: int, columns: int, depth: int, product: Product) -> tuple[Blocks, ...]:
    """Configurations to choose from for tiles of [rows, columns] summed over `depth`, none of them twice."""
    fitting: dict[tuple[int, int, int], Blocks] = {}
    for blocks in product.blocks:
        r, c, d = block_for(rows, blocks.rows), block_for(columns, blocks.columns), block_for(depth, blocks.depth)
        warps = max(min(blocks.warps, max(r * c, r * d, c * d) // 256), 1)
        fitting.setdefault((r, c, d), Blocks(r, c, d, warps, blocks.stages, blocks.registers))
    return tuple(fitting.values())


def square_candidates(side: int, depth: int, product: Product) -> tuple[Blocks, ...]:
    """The same for tiles of one size, each of which leaves a number in a place of its own."""
    chosen = candidates(side, side, depth, product)
    square = tuple(blocks for blocks in chosen if blocks.rows == blocks.columns == side)
    return square


def square_side(size: int, product: Product) -> int:
    """The side of such a tile over `size` rows or columns."""
    return block_for(size, product.blocks[0].rows)


def block_for(size: int, widest: int) -> int:
    """The width of a block over `size` elements."""
    return min(max(triton.next_power_of_2(max(size, 1)), NARROWEST), widest)


@functools.cache
def tuned(kernel: Any, blocks: tuple[Blocks, ...], key: tuple[str, ...]) -> Any:
    """The kernel in the fastest of its configurations, found out once for each dtype and size of the keys."""
    configurations = [
        triton.Config(
            {"ROWS": b.rows, "COLUMNS": b.columns, "DEPTH": b.depth},
            num_warps=b.warps,
            num_stages=b.stages,
            maxnreg=b.registers,
        )
        for b in blocks
    ]
    return tuning.tuned(kernel, configurations, key)


def parts_for(size: int, programs: int, smallest: int) -> int:
    """Into how many parts to cut a sum over `size` terms, where `programs` exist without: few, and none very short."""
    wanted = triton.cdiv(ENOUGH_PROGRAMS, max(programs, 1))
    return max(min(wanted, size // smallest), 1)


@triton.jit
def gradient_tile(
    inputs,  # [T, I] of a sample, or from a sample's first position on
    output_grads,  # [T, O], likewise
    weights,  # of the samples from this one on, read if WEIGHTED
    first,  # positions to sum over, counted from this sample's first one
    last,
    T,
    o,  # [ROWS], INDEX: the tile's rows in O
    i,  # [COLUMNS], int64: its columns in I
    outputs,
    features,
    a_sample,  # strides: of samples, positions and features
    a_position,
    a_feature,
    b_sample,
    b_position,
    b_feature,
    weight_stride,
    WEIGHTED: tl.constexpr,  # positions past T are the next sample's; each is weighted by its sample
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sum over positions of w b a^T: [ROWS, COLUMNS] in float32. What lies outside the tensors is 0."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, DEPTH):
        at = start + tl.arange(0, DEPTH)
        there = at < last
        if WEIGHTED:
            sample = at // T
            position = (at - sample * T).to(INDEX)
            sample = sample.to(INDEX)
            a_row = inputs + (sample * a_sample + position * a_position)
            b_row = output_grads + (sample * b_sample + position * b_position)
        else:
            a_row = inputs + at.to(INDEX) * a_position
            b_row = output_grads + at.to(INDEX) * b_position
        a = tl.load(a_row[:, None] + i[None, :] * a_feature, mask=there[:, None] & (i < features)[None, :], other=0.0)
        b = tl.load(b_row[None, :] + o[:, None] * b_feature, mask=there[None, :] & (o < outputs)[:, None], other=0.0)
        if WIDE:
            a = a.to(tl.float32)
        if WEIGHTED:
            w = tl.load(weights + sample * weight_stride, mask=there, other=0.0).to(tl.float32)
            b = (b.to(tl.float32) * w[None, :]).to(a.dtype)
        elif WIDE:
            b = b.to(tl.float32)
        tile = tl.dot(b, a, tile, input_precision=PRECISION)
    return tile
