"""Small gradients that are formed at once (of biases and norms), side by side: one product serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Materialised, Term


class Together(Materialised):
    """Several terms as one: [N, elements of all of them].

    A product for each of a deep network's biases and norms would cost more in calls than in work.
    """

    def __init__(self, terms: Sequence[Materialised]) -> None:
        sizes = [term.shape.numel() for term in terms]
        pieces = [term.values if term.values.dim() == 2 else term.values.reshape(term.samples, -1) for term in terms]
        super().__init__(torch.cat(pieces, 1))
        self.parts = [Part(self, number, term.shape) for number, term in enumerate(terms)]
        self._sizes = sizes
        self._sums: tuple[Tensor, tuple[Tensor, ...]] | None = None  # weights, and what came of them

    def sum_of(self, number: int, weights: Tensor) -> Tensor:
        """One part's weighted sum; those of all are formed at the first asking for these weights."""
        if self._sums is None or self._sums[0] is not weights:
            self._sums = weights, self.weighted(weights).split(self._sizes)
        return self._sums[1][number]

    def columns(self, number: int) -> Tensor:
        """One part's gradients: [N, its elements]."""
        return self.values.split(self._sizes, 1)[number]


class Part(Term):
    """One of them."""

    def __init__(self, whole: Together, number: int, shape: torch.Size) -> None:
        self._whole, self._number = whole, number
        self.samples, self.shape, self.dtype = whole.samples, shape, whole.dtype

    def _alone(self) -> Materialised:
        return Materialised(self._whole.columns(self._number).reshape(self.samples, *self.shape))

    def grads(self, out: Tensor | None = None) -> Tensor:
        """See Term."""
        return self._alone().grads(out)

    def dots(self, directions: Tensor) -> Tensor:
        """See Term."""
        return self._alone().dots(directions)

    def weighted(self, weights: Tensor) -> Tensor:
        """See Term."""
        of_part = self._whole.sum_of(self._number, weights)
        return of_part if len(self.shape) == 1 else of_part.view(self.shape)

    def block(self, start: int, stop: int) -> Term:
        """See Term."""
        return self._alone().block(start, stop)
