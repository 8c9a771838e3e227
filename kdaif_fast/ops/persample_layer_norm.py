"""persample_layer_norm: each sample's gradients of the affine parameters of a layer or RMS norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from ..reference import persample_layer_norm as reference
from . import _check
from ._plain import kernel_or_reference

OP = "persample_layer_norm"

_persample_layer_norm = define(
    "persample_layer_norm(Tensor inputs, Tensor output_grads, Tensor? mean, Tensor rstd) -> (Tensor, Tensor)",
    fake=reference.persample_layer_norm,
    reference=reference.persample_layer_norm,
    triton="persample_layer_norm",
)


def persample_layer_norm(
    inputs: Tensor, output_grads: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Each sample's gradients in the weight and the bias of a layer norm, in one pass over inputs and output_grads.

    With x_hat = (x - mean) rstd, mean and 1 / sqrt(variance + eps) of one position's features: dw_d = sum_t b_td
    x_hat_td and dc_d = sum_t b_td. An RMS norm has no mean.

    On the CPU the kernel is not differentiable; where a derivative may be asked for (an argument requires grad, or a
    transform or compiler is at work) the definition in plain torch answers, differentiable in every tensor.

    Args:
        inputs: [N, T, D], the layer's inputs: D features at T positions; float32, float64, bfloat16 or float16.
        output_grads: [N, T, D], the gradient of each sample's loss at the layer's outputs; dtype and device of the
            inputs.
        mean: [N, T] of any float dtype, or None: 0.
        rstd: [N, T] of any float dtype.

    Returns:
        dw [N, D] and dc [N, D], in float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not belong together. Each names the argument and its value.

    Memory (CPU): the results. Inputs and output_grads are read in place if a position's features are contiguous, else
        copied.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import persample_layer_norm
        >>> inputs, output_grads = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> persample_layer_norm(inputs, output_grads, torch.tensor([[2.0, 6.0]]), torch.tensor([[1.0, 1.0]]))
        (tensor([[-4.,  6.]]), tensor([[4., 6.]]))
    """
    _check.is_floating(OP, "inputs", inputs, "[...]")
    _check.is_floating(OP, "output_grads", output_grads, "[...]")
    if inputs.dim() != 3:
        raise ValueError(f"{OP}: inputs has shape {tuple(inputs.shape)}, expected [N, T, D]")
    _check.is_like(OP, "output_grads", output_grads, inputs.shape, "inputs", inputs.device)
    if output_grads.dtype != inputs.dtype:
        raise TypeError(f"{OP}: output_grads has dtype {output_grads.dtype}, expected {inputs.dtype} as inputs")
    wide = torch.promote_types(inputs.dtype, torch.float32)
    for name, statistic in [("mean", mean), ("rstd", rstd)]:
        if statistic is None and name == "mean":
            continue
        _check.is_floating(OP, name, statistic, "[...]")
        _check.is_like(OP, name, statistic, inputs.shape[:2], "the positions of inputs", inputs.device)
    dw, dc = kernel_or_reference(
        _persample_layer_norm,
        reference.persample_layer_norm,
        inputs,
        output_grads,
        None if mean is None else mean.to(wide),
        rstd.to(wide),
    )
    return dw, dc
