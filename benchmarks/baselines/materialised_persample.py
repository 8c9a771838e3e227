"""Per-sample quantities from the gradients of every sample, stored: what is left to do once a library has made them.

The base of every contestant of bench_persample.py; each overrides what it can do better.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kdaif_fast import sigmoid_weights

Tree = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class UnsupportedError(Exception):
    """The contestant cannot do this, for the reason given."""


class Materialised:
    """Keeps a model of its own, since peers put hooks into it."""

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """By the names that `grads` uses."""
        return dict(self.model.named_parameters())

    def own(self, tree: Tree, leading: int = 0) -> Tree:
        """A tree shaped like the benchmark's model, with `leading` axes before the parameters', in own names."""
        return tree

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape] of the gradients of the losses' sum."""
        raise UnsupportedError(f"{type(self).__name__} has no materialised gradients")

    def dots(self, batch: Batch, direction: Tree) -> Tensor:
        """[N]"""
        return contract(self.grads(batch), self.own(direction))

    def norms(self, batch: Batch) -> Tensor:
        """[N]"""
        squares = [grad.flatten(1).square().sum(1) for grad in self.grads(batch).values()]
        return torch.stack(squares).sum(0).sqrt()

    def weighted_step(self, batch: Batch, direction: Tree) -> None:
        """Leaves the gradient of mean(w_i l_i) in `.grad`."""
        self.model.zero_grad(set_to_none=True)
        grads = self.grads(batch)
        weights = sigmoid_weights(-contract(grads, self.own(direction)))
        for name, parameter in self.named_parameters().items():
            parameter.grad = torch.tensordot(weights / len(weights), grads[name], 1)


def contract(grads: Tree, direction: Tree) -> Tensor:
    """<g_i, direction> for every sample."""
    return torch.stack([grad.flatten(1) @ direction[name].flatten() for name, grad in grads.items()]).sum(0)
