"""persample_group_norm: each sample's gradients of the affine parameters of a group norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from ..reference import persample_group_norm as reference
from . import _check
from ._plain import kernel_or_reference

OP = "persample_group_norm"

_persample_group_norm = define(
    "persample_group_norm(Tensor inputs, Tensor output_grads, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    fake=reference.persample_group_norm,
    reference=reference.persample_group_norm,
    triton="persample_group_norm",
)


def persample_group_norm(inputs: Tensor, output_grads: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's gradients in the weight and the bias of a group norm, in one pass over inputs and output_grads.

    With x_hat = (x - mean) rstd, the group's mean and 1 / sqrt(variance + eps): dw_c = sum_l b_cl x_hat_cl and
    dq_c = sum_l b_cl. An instance norm has one group a channel; the statistics of a batch norm in evaluation are one
    group a channel, the same for every sample.

    On the CPU the kernel is not differentiable; where a derivative may be asked for (an argument requires grad, or a
    transform or compiler is at work) the definition in plain torch answers, differentiable in every tensor.

    Args:
        inputs: [N, C, L], the layer's inputs, L positions; float32, float64, bfloat16 or float16.
        output_grads: [N, C, L], the gradient of each sample's loss at the layer's outputs; dtype and device of the
            inputs.
        mean: [N, groups] of any float dtype; groups a divisor of C.
        rstd: [N, groups], likewise.

    Returns:
        dw [N, C] and dq [N, C], in float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not belong together. Each names the argument and its value.

    Memory (CPU): the results. Inputs and output_grads are read in place if the positions of a channel are contiguous,
        else copied.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import persample_group_norm
        >>> inputs, output_grads = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> persample_group_norm(inputs, output_grads, torch.tensor([[4.0]]), torch.tensor([[0.5]]))
        (tensor([[-2.5000,  7.5000]]), tensor([[3., 7.]]))
    """
    _check.is_floating(OP, "inputs", inputs, "[...]")
    _check.is_floating(OP, "output_grads", output_grads, "[...]")
    if inputs.dim() != 3:
        raise ValueError(f"{OP}: inputs has shape {tuple(inputs.shape)}, expected [N, C, L]")
    _check.is_like(OP, "output_grads", output_grads, inputs.shape, "inputs", inputs.device)
    if output_grads.dtype != inputs.dtype:
        raise TypeError(f"{OP}: output_grads has dtype {output_grads.dtype}, expected {inputs.dtype} as inputs")
    _check.is_floating(OP, "mean", mean, "[...]")
    _check.is_floating(OP, "rstd", rstd, "[...]")
    N, C = inputs.shape[:2]
    if mean.dim() != 2 or mean.shape[0] != N or mean.shape[1] == 0 or C % mean.shape[1] != 0:
        raise ValueError(f"{OP}: mean has shape {tuple(mean.shape)}, expected [{N}, groups], groups a divisor of {C}")
    _check.is_like(OP, "mean", mean, mean.shape, "inputs", inputs.device)
    _check.is_like(OP, "rstd", rstd, mean.shape, "mean", inputs.device)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    dw, dq = kernel_or_reference(
        _persample_group_norm, reference.persample_group_norm, inputs, output_grads, mean.to(wide), rstd.to(wide)
    )
    return dw, dq
