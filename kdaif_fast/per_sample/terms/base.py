"""What every kind of per-sample gradient can be asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..._tree import as_real, wide_dtype

# Per-sample gradients that are only a step to something else are made in blocks of about this many elements.
BLOCK_ELEMENTS = 1 << 22


class NoRule(Exception):  # noqa: N818
    """A case that the rule of a node, or the term it makes, does not cover: the generic term does."""


class Term(ABC):
    """G_i, the gradient of each sample's loss in one tensor of parameters, not necessarily formed.

    Attributes:
        samples: N.
        shape: of the tensor.
        dtype: of the gradients.
    """

    samples: int
    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def grads(self, out: Tensor | None = None) -> Tensor:
        """G: [N, *shape], written to `out` if it is given."""

    @abstractmethod
    def dots(self, directions: Tensor) -> Tensor:
        """<G_i, V_k>: [K, *shape] -> [N, K], in float32 at least."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """sum_i w_i G_i: [N] -> [*shape]."""

    @abstractmethod
    def block(self, start: int, stop: int) -> Term:
        """The term of some of the samples."""

    def squared_norms(self) -> Tensor:
        """||G_i||^2: [N], in float32 at least."""
        step = max(1, BLOCK_ELEMENTS // max(1, self.shape.numel()))
        pieces = []
        for start in range(0, self.samples, step):
            G = self.block(start, min(start + step, self.samples)).grads().reshape(-1, self.shape.numel())
            pieces.append(as_real(G.to(wide_dtype(G.dtype))).square().sum(1))
        return torch.cat(pieces)

    def squares(self) -> Tensor:
        """sum_i G_i^2, element by element: [*shape], in float32 at least."""
        total = torch.zeros((), dtype=wide_dtype(self.dtype))
        step = max(1, BLOCK_ELEMENTS // max(1, self.shape.numel()))
        for start in range(0, self.samples, step):
            G = self.block(start, min(start + step, self.samples)).grads()
            part = torch.linalg.vector_norm(G, dim=0, dtype=wide_dtype(G.dtype)).square_()
            total = part if start == 0 else total.add_(part)
        return total

    def step(self, directions: Tensor) -> tuple[Tensor, Term]:
        """The dots, and what to keep for the weighted sum that follows."""
        return self.dots(directions), self


class Materialised(Term):
    """G itself: [N, *shape]."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.samples, self.shape, self.dtype = values.shape[0], values.shape[1:], values.dtype

    def grads(self, out: Tensor | None = None) -> Tensor:
        """See Term."""
        return self.values if out is None else out.copy_(self.values)

    def dots(self, directions: Tensor) -> Tensor:
        """See Term."""
        flat, directions = self._flat(), directions.reshape(len(directions), self.shape.numel())
        wide = wide_dtype(flat.dtype)
        if flat.dtype != wide or directions.dtype != wide:
            flat, directions = flat.to(wide), directions.to(wide)
        return flat.mm(directions.t())

    def weighted(self, weights: Tensor) -> Tensor:
        """See Term."""
        flat = self._flat()
        weights = weights if weights.dtype == flat.dtype else weights.to(flat.dtype)
        return weights.matmul(flat).view(self.shape)

    def _flat(self) -> Tensor:
        return self.values if self.values.dim() == 2 else self.values.reshape(self.samples, -1)

    def squared_norms(self) -> Tensor:
        """See Term."""
        flat = self.values.reshape(self.samples, -1)
        return torch.linalg.vector_norm(flat, dim=1, dtype=wide_dtype(flat.dtype)).square()

    def block(self, start: int, stop: int) -> Materialised:
        """See Term."""
        return Materialised(self.values[start:stop])
