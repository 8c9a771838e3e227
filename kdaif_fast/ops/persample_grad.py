"""persample_grad: each sample's weight gradient of a linear layer."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import persample_grad as reference
from ._plain import kernel_or_reference

_persample_grad = define(
    "persample_grad(Tensor inputs, Tensor output_grads) -> Tensor",
    fake=reference.persample_grad,
    reference=reference.persample_grad,
)


def persample_grad(inputs: Tensor, output_grads: Tensor, out: Tensor | None = None) -> Tensor:
    """G_i: [N, T, I], [N, T, O] -> [N, O, I]."""
    grads = kernel_or_reference(_persample_grad, reference.persample_grad, inputs, output_grads)
    return grads if out is None else out.copy_(grads)
