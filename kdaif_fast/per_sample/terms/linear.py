"""G_i = sum_t b_it a_it^T: matrix products with a weight, over T positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._tree import wide_dtype
from ...ops.persample_grad import persample_grad
from .base import Term

# What is passed is right by construction, and nobody differentiates it: straight to the kernels, past all checks.
_KERNELS = torch.ops.kdaif_fast


class LinearTerm(Term):
    """Of z = a W^T, or z = a W if `transposed`; W is [O, I], or [I, O], or a reshape of it.

    Args:
        inputs: a [N, T, I].
        output_grads: b [N, T, O].
        transposed: whether the weight is [I, O].
        shape: the weight's, if it is a reshape of that.
    """

    def __init__(
        self, inputs: Tensor, output_grads: Tensor, transposed: bool = False, shape: torch.Size | None = None
    ) -> None:
        if inputs.dtype != output_grads.dtype:
            inputs = inputs.to(output_grads.dtype)
        self.inputs, self.output_grads, self.transposed = inputs, output_grads, transposed
        self.samples, self.dtype = inputs.shape[0], output_grads.dtype
        I, O = inputs.shape[2], output_grads.shape[2]  # noqa: E741
        self.matrix = torch.Size((I, O) if transposed else (O, I))
        self.shape = self.matrix if shape is None else shape

    def _oriented(self, x: Tensor) -> Tensor:
        """[..., O, I] from [..., *shape] or back."""
        return x.mT if self.transposed else x

    def grads(self, out: Tensor | None = None) -> Tensor:
        """See Term."""
        if out is not None:
            persample_grad(self.inputs, self.output_grads, out=self._oriented(out.view(self.samples, *self.matrix)))
            return out
        return self._oriented(persample_grad(self.inputs, self.output_grads)).reshape(self.samples, *self.shape)

    def _directions(self, directions: Tensor) -> Tensor:
        if self.shape is not self.matrix:
            directions = directions.reshape(-1, *self.matrix)
        if directions.dtype != self.dtype:
            directions = directions.to(self.dtype)
        return directions.mT if self.transposed else directions

    def dots(self, directions: Tensor) -> Tensor:
        """See Term."""
        return _KERNELS.persample_dot.default(self.inputs, self.output_grads, self._directions(directions))

    def weighted(self, weights: Tensor) -> Tensor:
        """See Term."""
        grad = self._oriented(_KERNELS.weighted_grad.default(self.inputs, self.output_grads, weights))
        return grad if self.shape is self.matrix else grad.reshape(self.shape)

    def squared_norms(self) -> Tensor:
        """See Term."""
        return _KERNELS.persample_norm.default(self.inputs, self.output_grads)

    def squares(self) -> Tensor:
        """See Term."""
        if self.inputs.shape[1] != 1:
            return super().squares()
        wide = wide_dtype(self.dtype)
        a, b = (x[:, 0].to(wide).square() for x in (self.inputs, self.output_grads))
        return self._oriented(b.T @ a).reshape(self.shape)

    def block(self, start: int, stop: int) -> LinearTerm:
        """See Term."""
        return LinearTerm(self.inputs[start:stop], self.output_grads[start:stop], self.transposed, self.shape)

    @staticmethod
    def joined(terms: list[LinearTerm]) -> LinearTerm:
        """Of a weight that is used several times in the same way: the positions of all uses together."""
        inputs = torch.cat([term.inputs for term in terms], 1)
        output_grads = torch.cat([term.output_grads for term in terms], 1)
        return LinearTerm(inputs, output_grads, terms[0].transposed, terms[0].shape)
