"""persample_layer_norm: each sample's gradients of the affine parameters of a layer or RMS norm."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import persample_layer_norm as reference
from ._plain import kernel_or_reference

_persample_layer_norm = define(
    "persample_layer_norm(Tensor inputs, Tensor output_grads, Tensor? mean, Tensor rstd) -> (Tensor, Tensor)",
    fake=reference.persample_layer_norm,
    reference=reference.persample_layer_norm,
)


def persample_layer_norm(
    inputs: Tensor, output_grads: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """[N, T, D], [N, T, D], [N, T] or None, [N, T] -> dw, dc [N, D]."""
    return kernel_or_reference(_persample_layer_norm, reference.persample_layer_norm, inputs, output_grads, mean, rstd)
