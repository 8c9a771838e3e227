"""What the Triton kernels of per-sample gradients share: a tile of sum_t b_t a_t^T, its blocks, and its launch.

Products of float16 and bfloat16 are formed on tensor cores from the elements as they are and summed in float32. float32
is multiplied as torch's setting for matrix products says: in full by default, on tensor cores where TF32 is allowed.
None of these kernels has run on a GPU yet; tests/triton_kernels says what was checked without one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

MULTIPROCESSORS = 132  # of an H100; smaller GPUs have fewer
ENOUGH_PROGRAMS = 2 * MULTIPROCESSORS
MOST_REGISTERS = 255  # where the assembler left to itself would spill a little to have more threads at once
NARROWEST = 16  # of a side of a product that tensor cores form
WIDEST = 256


class Blocks(NamedTuple):
    """One configuration: the tile's two sides, the elements of the summed side that are loaded at a time, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most; None: as many as the assembler thinks right


# The best guess comes first: it is what runs where nothing may be timed. None of these spills on sm_80 and sm_90
# (tests/triton_kernels). One step of 128 x 256 x 64 in bfloat16 is 1024 clocks of a Hopper's tensor cores and some 120
# instructions of each of 8 warps: 240 for each of the four that issue them. A 128 x 128 tile reads a third more from L2
# for each product, but two of them fit where registers allow, so that one is at work while the other ends.
IN_FULL = (Blocks(128, 128, 16, 8, 3, MOST_REGISTERS), Blocks(64, 64, 16, 4, 3, MOST_REGISTERS))
HOPPER_TF32 = (Blocks(128, 128, 32, 8, 3), Blocks(64, 64, 32, 4, 3))
HOPPER_NARROW = (Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 8, 3), Blocks(64, 64, 64, 4, 4))
# The smallest of these GPUs have 99 KB of shared memory for a block.
TF32 = (Blocks(128, 128, 32, 8, 3, MOST_REGISTERS), Blocks(64, 64, 32, 4, 3))
NARROW = (Blocks(128, 128, 32, 8, 4), Blocks(64, 64, 32, 4, 4))
# Where nothing says that elements can be loaded several at a time, each needs an offset and a mask of its own.
ONE_BY_ONE = (Blocks(32, 32, 32, 4, 2),)
INTERPRETED = (Blocks(32, 32, 32, 4, 1),)  # a program costs milliseconds, however small


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_hopper() -> bool:
    """Whether the GPU has Hopper's matrix units and shared memory; False where there is none."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return False
    return target.backend == "cuda" and target.arch == 90


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
        if self.wide and self.precision != "tf32":
            return IN_FULL
        if is_hopper():
            return HOPPER_TF32 if self.wide else HOPPER_NARROW
        return TF32 if self.wide else NARROW


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


def for_offsets(product: Product, index: Any) -> Product:
    """The product with blocks whose offsets fit in registers: those of 64 bits take twice as many."""
    return product if index == tl.int32 else product._replace(vectors=False)


def candidates(rows: int, columns: int, depth: int, product: Product, count: int = 1) -> tuple[Blocks, ...]:
    """Configurations for tiles of `count` matrices [rows, columns] summed over `depth`, none of them twice.

    First come those that have a tile for every multiprocessor.
    """
    fitting: dict[tuple[int, int, int], Blocks] = {}
    for blocks in product.blocks:
        r, c, d = block_for(rows, blocks.rows), block_for(columns, blocks.columns), block_for(depth, blocks.depth)
        warps = max(min(blocks.warps, max(r * c, r * d, c * d) // 256), 1)
        if (r, c, d) not in fitting or blocks[:3] == (r, c, d):  # rather one of this size than a larger one cut to it
            fitting[r, c, d] = Blocks(r, c, d, warps, blocks.stages, blocks.registers)

    def busy(blocks: Blocks) -> int:
        tiles = triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns)
        return min(count * tiles, MULTIPROCESSORS)

    return tuple(sorted(fitting.values(), key=busy, reverse=True))


def square_candidates(side: int, depth: int, product: Product) -> tuple[Blocks, ...]:
    """The same for tiles of one size, each of which leaves a number in a place of its own."""
    chosen = candidates(side, side, depth, product)
    return tuple(blocks for blocks in chosen if blocks.rows == blocks.columns == side)


def square_side(size: int, product: Product) -> int:
    """The side of such a tile over `size` rows or columns: small where ordinary units multiply, from registers."""
    widest = 64 if product.blocks == IN_FULL else max(blocks.rows for blocks in product.blocks)
    return block_for(size, widest)


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


def even(size: int, sides: Iterable[int]) -> int:
    """The largest of the blocks' sides that divides the size, 1 if none does: others would only compile them anew."""
    return max((side for side in sides if size % side == 0), default=1)


# Elements of the largest tile of which there is room for two in registers: one of a sample, one of the weighted sum.
MOST_OF_TWO = tl.constexpr(128 * 128)


@triton.jit
def in_groups(program, rows, columns):
    """Row and column of a program's tile: some rows at a time, so that programs at work share both operands in L2."""
    size: tl.constexpr = 8
    group = program // (size * columns)
    height = tl.minimum(rows - group * size, size)
    within = program % (size * columns)
    return group * size + within % height, within // height


@triton.jit
def gradient_tile(
    inputs,  # [T, I] of a sample, or from a sample's first position on
    output_grads,  # [T, O], likewise
    weights,  # of the samples from this one on, read if WEIGHTED
    first,  # positions to sum over, counted from this sample's first one
    last,
    T,
    o,  # [ROWS], INDEX: the tile's rows in O
    i,  # [COLUMNS], INDEX: its columns in I
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
    EVEN_T: tl.constexpr,  # divide T, outputs and features
    EVEN_OUTPUTS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
):
    """Sum over positions of w b a^T: [ROWS, COLUMNS] in float32. What lies outside the tensors is 0."""
    of_one_sample: tl.constexpr = not WEIGHTED or EVEN_T % DEPTH == 0  # every step's positions are
    by_sample: tl.constexpr = WEIGHTED and of_one_sample and ROWS * COLUMNS <= MOST_OF_TWO
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    tile = total
    for start in range(first, last, DEPTH):
        at = start + tl.arange(0, DEPTH)
        there = at < last
        if of_one_sample:
            sample = start // T * WEIGHTED
            position = (at - sample * T).to(INDEX)
            sample = sample.to(INDEX)
        else:
            sample = at // T
            position = (at - sample * T).to(INDEX)
            sample = sample.to(INDEX)
        a_row = inputs + (sample * a_sample + position * a_position)
        b_row = output_grads + (sample * b_sample + position * b_position)
        i_there = (i < features)[None, :]
        o_there = (o < outputs)[:, None]
        a_from = a_row[:, None] + i[None, :] * a_feature
        b_from = b_row[None, :] + o[:, None] * b_feature
        if EVEN_T % DEPTH == 0 and EVEN_FEATURES % COLUMNS == 0:
            a = tl.load(a_from)
        elif EVEN_FEATURES % COLUMNS == 0:
            a = tl.load(a_from, mask=there[:, None], other=0.0)
        else:
            a = tl.load(a_from, mask=there[:, None] & i_there, other=0.0)
        if EVEN_T % DEPTH == 0 and EVEN_OUTPUTS % ROWS == 0:
            b = tl.load(b_from)
        elif EVEN_OUTPUTS % ROWS == 0:
            b = tl.load(b_from, mask=there[None, :], other=0.0)
        else:
            b = tl.load(b_from, mask=there[None, :] & o_there, other=0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if WEIGHTED and of_one_sample:
            w = tl.load(weights + sample * weight_stride).to(tl.float32)
            if not by_sample:
                b = (b.to(tl.float32) * w).to(a.dtype)
        elif WEIGHTED:
            w = tl.load(weights + sample * weight_stride, mask=there, other=0.0).to(tl.float32)
            b = (b.to(tl.float32) * w[None, :]).to(a.dtype)
        tile = tl.dot(b, a, tile, input_precision=PRECISION)
        if by_sample:  # noqa: SIM102 (a compile-time and a run-time condition)
            if (start + DEPTH) % T == 0 or start + DEPTH >= last:
                total += tile * w
                tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    return total if by_sample else tile
