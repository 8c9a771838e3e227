"""weighted_grad: the weight gradient of a linear layer for a weighted sum of the samples' losses."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import weighted_grad as reference
from ._plain import kernel_or_reference

_weighted_grad = define(
    "weighted_grad(Tensor inputs, Tensor output_grads, Tensor weights) -> Tensor",
    fake=reference.weighted_grad,
    reference=reference.weighted_grad,
)


def weighted_grad(inputs: Tensor, output_grads: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i G_i: [N, T, I], [N, T, O], [N] -> [O, I]."""
    return kernel_or_reference(_weighted_grad, reference.weighted_grad, inputs, output_grads, weights)
