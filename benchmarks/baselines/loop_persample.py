"""Per-sample quantities as a first attempt computes them: one forward and one backward pass per sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kdaif_fast import sigmoid_weights

from .materialised_persample import Batch, Materialised, Tree


class Loop(Materialised):
    """Holds one sample's gradient at a time, but where all are asked for."""

    def _each(self, batch: Batch) -> Iterator[Tree]:
        named = self.named_parameters()
        for x, y in zip(*batch, strict=True):
            loss = F.cross_entropy(self.model(x[None]), y[None])
            yield dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape]."""
        rows = list(self._each(batch))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def dots(self, batch: Batch, direction: Tree) -> Tensor:
        """[N]"""
        return torch.stack(
            [sum(torch.sum(g * direction[name]) for name, g in row.items()) for row in self._each(batch)]
        )

    def norms(self, batch: Batch) -> Tensor:
        """[N]"""
        return torch.stack([sum(g.square().sum() for g in row.values()).sqrt() for row in self._each(batch)])

    def weighted_step(self, batch: Batch, direction: Tree) -> None:
        """The loop for phi, then one ordinary backward pass of the weighted losses."""
        weights = sigmoid_weights(-self.dots(batch, direction))
        weighted_backward(self, batch, weights)


def weighted_backward(contestant: Materialised, batch: Batch, weights: Tensor) -> None:
    """A training step with known weights."""
    contestant.model.zero_grad(set_to_none=True)
    losses = F.cross_entropy(contestant.model(batch[0]), batch[1], reduction="none")
    (weights * losses).mean().backward()
