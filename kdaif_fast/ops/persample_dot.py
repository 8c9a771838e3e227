"""persample_dot: each sample's weight gradient of a linear layer, contracted with directions."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from ..reference import persample_dot as reference
from . import _linear_layer
from ._plain import kernel_or_reference


def _fake(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    return inputs.new_empty(inputs.shape[0], directions.shape[0], dtype=dtype)


_persample_dot = define(
    "persample_dot(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor",
    fake=_fake,
    reference=reference.persample_dot,
    triton="persample_dot",
)


def persample_dot(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """Each sample's weight gradient in a linear layer z = a W^T, contracted with directions: <G_i, V_k>.

    G_i = sum_t b_it a_it^T is never stored: the products are summed while they are in registers, either as
    sum_t b_it^T V_k a_it or, for many positions, tile by tile of G_i; whichever costs less. Differentiable to every
    order, batched by torch.func.vmap and traced by torch.compile (by its definition there).

    Args:
        inputs: a, [N, T, I], float32, float64, bfloat16 or float16; N samples of T positions.
        output_grads: b, [N, T, O], the gradient of each sample's loss at z; the inputs' dtype and device.
        directions: V, [K, O, I], any float dtype.

    Returns:
        [N, K], float32 (float64 for float64 inputs). Zeros where T is 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match. Each names the argument and its value.

    Memory: on the CPU a copy of directions if they are not contiguous or not float32 (float64 for float64 inputs), and
        a thread has at most half a megabyte or, from T = 64 on, T (O + 16) numbers. Inputs of any strides are read in
        place if a position's features are contiguous, else copied. With Triton a float for each position, direction
        and part of a direction's rows; a copy of directions in float32 for bfloat16 inputs, and perhaps with TF32.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import persample_dot
        >>> inputs = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])  # two samples of one position
        >>> output_grads = torch.tensor([[[1.0, -1.0]], [[0.0, 2.0]]])
        >>> persample_dot(inputs, output_grads, torch.eye(2)[None])
        tensor([[-1.],
                [ 0.]])
    """
    _linear_layer.check_layer("persample_dot", inputs, output_grads)
    _linear_layer.check_directions("persample_dot", directions, inputs, output_grads)
    return kernel_or_reference(_persample_dot, reference.persample_dot, inputs, output_grads, directions)
