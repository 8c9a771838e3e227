"""persample_norm: the squared norm of each sample's weight gradient of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from ..reference import persample_norm as reference
from . import _linear_layer
from ._plain import kernel_or_reference


def _fake(inputs: Tensor, output_grads: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], dtype=torch.promote_types(inputs.dtype, torch.float32))


_persample_norm = define(
    "persample_norm(Tensor inputs, Tensor output_grads) -> Tensor",
    fake=_fake,
    reference=reference.persample_norm,
    triton="persample_norm",
)


def persample_norm(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """Squared norm of each sample's weight gradient in a linear layer z = a W^T: ||G_i||^2.

    The square, so that layers can be added up. G_i = sum_t b_it a_it^T is never stored: of one position the norm is
    ||a|| ||b||; of several it is the sum over pairs of positions <a_t, a_t'> <b_t, b_t'> ("ghost norm", Goodfellow
    2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679), or the sum over tiles of G_i, whichever takes fewer
    operations.
    Differentiable to every order, batched by torch.func.vmap and traced by torch.compile (by its definition there).

    Args:
        inputs: a, [N, T, I], float32, float64, bfloat16 or float16; N samples of T positions.
        output_grads: b, [N, T, O], the gradient of each sample's loss at z; the inputs' dtype and device.

    Returns:
        [N], float32 (float64 for float64 inputs). Zeros where T is 0. Never below 0. Where the positions' gradients
        cancel, the sum over pairs has the rounding of the terms that cancelled: about 1e-6 of them in float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match. Each names the argument and its value.

    Memory: on the CPU a thread has T (I + O) numbers at most; the pairs' products are never stored whole. Inputs of any
        strides are read in place if a position's features are contiguous, else copied.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import persample_norm
        >>> inputs = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])  # two samples of one position
        >>> output_grads = torch.tensor([[[1.0, -1.0]], [[0.0, 2.0]]])
        >>> persample_norm(inputs, output_grads)
        tensor([10., 36.])
    """
    _linear_layer.check_layer("persample_norm", inputs, output_grads)
    return kernel_or_reference(_persample_norm, reference.persample_norm, inputs, output_grads)
