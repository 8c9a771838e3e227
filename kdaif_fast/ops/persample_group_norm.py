"""persample_group_norm: each sample's gradients of the affine parameters of a group norm."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import persample_group_norm as reference
from ._plain import kernel_or_reference

_persample_group_norm = define(
    "persample_group_norm(Tensor inputs, Tensor output_grads, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    fake=reference.persample_group_norm,
    reference=reference.persample_group_norm,
)


def persample_group_norm(inputs: Tensor, output_grads: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, L], [N, C, L], [N, groups], [N, groups] -> dw, dq [N, C]."""
    return kernel_or_reference(_persample_group_norm, reference.persample_group_norm, inputs, output_grads, mean, rstd)
