"""persample_conv out of torch's own operations: for CUDA, where convolutions and products are the vendor's.

<G_i, V_k> = <b_i, conv(x_i; V_k)>: one convolution with all directions side by side as output channels, whose result is
contracted with b sample by sample, in float32. G is formed only where it is asked for: patches, one column a position,
and a batched product, for as many samples at a time as bound the memory. Of norms, whichever costs less: those of such
parts of G, or sums over pairs of positions of <b_t, b_t'> <u_t, u_t'>.

Directions are rounded to the inputs' dtype, and so is the convolution's result, as the layer's own output is: in
bfloat16 a dot is off by up to 2^-8 of the sum of its terms' magnitudes, and mostly by far less, as errors cancel.
float32 is convolved and multiplied as torch's settings say: by default in TF32 in convolutions, in full in products.
Nothing here is nondeterministic where torch's convolutions are not, and nothing waits for the GPU. It has not run on
one yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.persample_conv import patches
from ._persample_inner import persample_inner

CONVOLVED_ELEMENTS = 1 << 26  # of a convolution's result with several directions; with one it is as large as b
PATCH_ELEMENTS = 1 << 25  # of the patches of the samples that are treated together


class Geometry(NamedTuple):
    """A convolution's numbers."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


@torch.no_grad()
def persample_conv(
    inputs: Tensor,
    output_grads: Tensor,
    directions: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grads: bool,
    norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.persample_conv; directions of any float dtype."""
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    N, O, C = len(inputs), output_grads.shape[1], inputs.shape[1]  # noqa: E741
    G = inputs.new_empty(N, O, C // groups, *kernel) if grads else None
    dots, squares = (
        _dots(inputs, output_grads, directions, geometry),
        _gradients(inputs, output_grads, geometry, norms, G),
    )
    return (inputs.new_zeros(0) if G is None else G), dots, squares


@torch.no_grad()
def persample_conv_out(
    inputs: Tensor,
    output_grads: Tensor,
    directions: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    norms: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same with G written to `out`, each of whose samples is contiguous."""
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    dots = _dots(inputs, output_grads, directions, geometry)
    return dots, _gradients(inputs, output_grads, geometry, norms, out)


def _dots(x: Tensor, b: Tensor, directions: Tensor | None, geometry: Geometry) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    K = 0 if directions is None else len(directions)
    if directions is None or 0 in (len(x), K):
        return torch.zeros((len(x), K), dtype=wide, device=x.device)
    # float16 ends at 65504, and directions are of any size: each is brought to about 1 where a channel has most.
    size = None
    if x.dtype == torch.float16:
        directions = directions.to(wide)
        size = torch.linalg.vector_norm(directions.flatten(2), dim=2).amax(1)
        directions = directions / size.clamp(min=torch.finfo(wide).tiny).view(-1, *[1] * (directions.dim() - 1))
    step = max(1, CONVOLVED_ELEMENTS // max(b.numel(), 1))
    parts = [_dots_of_some(x, b, directions[start : start + step].to(x.dtype), geometry) for start in range(0, K, step)]
    dots = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return dots if size is None else dots * size


def _dots_of_some(x: Tensor, b: Tensor, directions: Tensor, geometry: Geometry) -> Tensor:
    groups, K, O = geometry.groups, len(directions), b.shape[1]  # noqa: E741
    weight = directions.unflatten(1, (groups, O // groups)).transpose(0, 1).flatten(0, 2)  # a group's are neighbours
    none = [0] * len(geometry.kernel)
    with torch.autocast(x.device.type, enabled=False):
        z = torch.ops.aten.convolution.default(
            x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, none, groups
        )
    for axis, size in enumerate(b.shape[2:], 2):
        if z.shape[axis] != size:  # positions that the output padding of a transposed convolution costs
            z = z.narrow(axis, 0, size)
    return persample_inner(
        z.unflatten(1, (groups, K, O // groups)).transpose(1, 2), b.unflatten(1, (groups, O // groups))
    )


def _gradients(x: Tensor, b: Tensor, geometry: Geometry, norms: bool, G: Tensor | None) -> Tensor:
    """Writes G if it is given; returns the squared norms, of no samples unless they are wanted."""
    N, groups = len(x), geometry.groups
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = torch.zeros(N if norms else 0, dtype=wide, device=x.device)
    if not norms and G is None:
        return squares
    O, L = b.shape[1] // groups, b.shape[2:].numel()  # noqa: E741
    Q = x.shape[1] // groups * math.prod(geometry.kernel)
    pairs = G is None and pairs_are_cheaper(L, O, Q)
    step = max(1, PATCH_ELEMENTS // (groups * max(Q * L, 1, 2 * L * L if pairs else O * Q)))
    for start in range(0, N, step):
        part = slice(start, min(start + step, N))
        n = part.stop - start
        U = patches(x[part], *geometry[:4], b.shape[2:]).reshape(n * groups, Q, L)
        B = b[part].reshape(n * groups, O, L)
        if pairs:
            products = _product(U.mT, U, wide).mul_(_product(B.mT, B, wide))
            torch.sum(products.view(n, -1), 1, out=squares[part])
            continue
        if G is not None and not norms and (groups == 1 or G.is_contiguous()):
            _product(B, U.mT, x.dtype, out=G[part].view(n * groups, O, Q))
            continue
        products = _product(B, U.mT, wide if norms else x.dtype)
        if norms:
            squares[part] = torch.linalg.vector_norm(products.view(n, -1), dim=1).square_()
        if G is not None:
            G[part].copy_(products.view_as(G[part]))
    return squares


def pairs_are_cheaper(positions: int, outputs: int, patch: int) -> bool:
    """Whether two matrices of [positions, positions] cost less than one of [outputs, patch]."""
    return positions * (outputs + patch) < outputs * patch


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right, summed in float32 at least and rounded to a dtype."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == dtype:
            return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
        if left.is_cuda:
            return torch.bmm(left, right, out_dtype=dtype)
        return torch.bmm(left.to(dtype), right.to(dtype))
