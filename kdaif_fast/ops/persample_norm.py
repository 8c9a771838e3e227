"""persample_norm: the squared norm of each sample's weight gradient of a linear layer."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import persample_norm as reference
from ._plain import kernel_or_reference

_persample_norm = define(
    "persample_norm(Tensor inputs, Tensor output_grads) -> Tensor",
    fake=reference.persample_norm,
    reference=reference.persample_norm,
)


def persample_norm(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """||G_i||^2: [N, T, I], [N, T, O] -> [N]."""
    return kernel_or_reference(_persample_norm, reference.persample_norm, inputs, output_grads)
