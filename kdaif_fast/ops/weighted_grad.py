"""weighted_grad: the weight gradient of a linear layer for a weighted sum of the samples' losses."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import weighted_grad as reference
from . import _linear_layer
from ._plain import kernel_or_reference


def _fake(inputs: Tensor, output_grads: Tensor, weights: Tensor) -> Tensor:
    return inputs.new_empty(output_grads.shape[2], inputs.shape[2])


_weighted_grad = define(
    "weighted_grad(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor",
    fake=_fake,
    reference=reference.weighted_grad,
    triton="weighted_grad",
)


def weighted_grad(inputs: Tensor, output_grads: Tensor, weights: Tensor) -> Tensor:
    """Weight gradient of a linear layer z = a W^T for the weighted sum of the samples' losses: sum_i w_i G_i.

    The weights are applied while blocks of b are packed for the product, so they cost no pass and no copy; with them
    known only after the output gradients, this is the last product of a one-pass weighted training step. Differentiable
    to every order, batched by torch.func.vmap and traced by torch.compile (by its definition there).

    Args:
        inputs: a, [N, T, I], float32, float64, bfloat16 or float16; N samples of T positions.
        output_grads: b, [N, T, O], the gradient of each sample's loss at z; the inputs' dtype and device.
        weights: w, [N], any float dtype, of any sign.

    Returns:
        [O, I] in the inputs' dtype; weighted and summed in float32 at least, rounded once. Zeros where N or T is 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match. Each names the argument and its value.

    Memory: the result (in float32 as well for bfloat16 and float16); on the CPU about half a megabyte a thread. Inputs
        of any strides are read in place if a position's features are contiguous, else copied.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import weighted_grad
        >>> inputs = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])  # two samples of one position
        >>> output_grads = torch.tensor([[[1.0, -1.0]], [[0.0, 2.0]]])
        >>> weighted_grad(inputs, output_grads, torch.tensor([1.0, 0.5]))
        tensor([[ 1.,  2.],
                [ 2., -2.]])
    """
    _linear_layer.check_layer("weighted_grad", inputs, output_grads)
    _linear_layer.check_weights("weighted_grad", weights, inputs)
    return kernel_or_reference(_weighted_grad, reference.weighted_grad, inputs, output_grads, weights)
