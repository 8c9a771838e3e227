"""persample_dot: each sample's weight gradient of a linear layer, contracted with directions."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import persample_dot as reference
from ._plain import kernel_or_reference

_persample_dot = define(
    "persample_dot(Tensor inputs, Tensor output_grads, Tensor directions) -> Tensor",
    fake=reference.persample_dot,
    reference=reference.persample_dot,
)


def persample_dot(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """<G_i, V_k>: [N, T, I], [N, T, O], [K, O, I] -> [N, K]."""
    return kernel_or_reference(_persample_dot, reference.persample_dot, inputs, output_grads, directions)
