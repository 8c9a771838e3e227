"""persample_conv by definition: each sample's weight gradient of a convolution, its dot products and its norm.

A convolution of 1 to 3 spatial axes, with groups: z = conv(x; W), x [N, C, *S], W [O, C / groups, *kernel],
b [N, O, *positions] the gradient of each sample's loss at z. With U_i the patches of sample i, one column a position,
G_i = b_i U_i^T, group by group. Of a transposed convolution G_i is the same with x and b exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """[N, C, *S] -> [N, C, *kernel, *positions]: what every element of the kernel meets at every position."""
    axes = len(kernel)
    padded = inputs
    if any(padding):  # padding by nothing would copy
        padded = F.pad(inputs, [amount for p in reversed(padding) for amount in (p, p)])
    for axis in range(axes):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        windows = padded.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
        padded = windows.narrow(2 + axis, 0, positions[axis])
    order = [0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes)]
    return padded.permute(order)


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
    """G [N, O, C / groups, *kernel] (empty unless `grads`), <G_i, V_k> [N, K], ||G_i||^2 [N] (empty unless `norms`).

    `directions` are [K, O, C / groups, *kernel]; without them K is 0. G has the inputs' dtype, the rest float32 or
    float64.
    """
    N, C, O = inputs.shape[0], inputs.shape[1], output_grads.shape[1]  # noqa: E741
    wide = torch.promote_types(inputs.dtype, torch.float32)
    positions = output_grads.shape[2:]
    U = patches(inputs.to(wide), kernel, stride, padding, dilation, positions)
    U = U.reshape(N, groups, C // groups * math.prod(kernel), math.prod(positions))
    b = output_grads.to(wide).reshape(N, groups, O // groups, math.prod(positions))
    G = torch.einsum("ngol,ngql->ngoq", b, U).reshape(N, O, C // groups, *kernel)
    flat = G.flatten(1)
    dots = flat.new_zeros(N, 0) if directions is None else flat @ directions.to(wide).flatten(1).T
    squares = flat.square().sum(1) if norms else flat.new_zeros(0)
    return (G.to(inputs.dtype) if grads else inputs.new_zeros(0)), dots, squares
