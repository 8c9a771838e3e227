"""Curvature products as most code computes them: a second backward pass per vector, on a graph that is kept.

The base of every contestant of bench_hvp.py; each overrides what it can do better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = tuple[Tensor, Tensor]


class UnsupportedError(Exception):
    """The contestant cannot do this, for the reason given."""


class DoubleBackward:
    """Products of the Hessian or the Gauss-Newton matrix of the mean cross-entropy.

    Args:
        model: in its mode of training.
        batch: inputs and classes.
        curvature: "hessian" or "ggn".
    """

    def __init__(self, model: nn.Module, batch: Batch, curvature: str):
        self.model, self.batch, self.curvature = model, batch, curvature
        self.parameters = list(model.parameters())

    def linearise(self) -> None:
        """What is done once for any number of products."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            outputs = self.model(self.batch[0])
        if self.curvature == "hessian":
            loss = F.cross_entropy(outputs, self.batch[1])
            self.grads = torch.autograd.grad(loss, self.parameters, create_graph=True)
            return
        self.outputs, self.dummy = outputs, torch.zeros_like(outputs, requires_grad=True)
        self.pulled = torch.autograd.grad(outputs, self.parameters, self.dummy, create_graph=True)
        self.cut = outputs.detach().requires_grad_()
        (self.output_grads,) = torch.autograd.grad(
            F.cross_entropy(self.cut, self.batch[1]), self.cut, create_graph=True
        )

    def products(self, vectors: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        return torch.stack([self._product(self.shaped(vector)) for vector in vectors])

    def _product(self, pieces: Sequence[Tensor]) -> Tensor:
        if self.curvature == "hessian":
            return flat(torch.autograd.grad(self.grads, self.parameters, pieces, retain_graph=True))
        (tangent,) = torch.autograd.grad(self.pulled, self.dummy, pieces, retain_graph=True)
        (curved,) = torch.autograd.grad(self.output_grads, self.cut, tangent, retain_graph=True)
        return flat(torch.autograd.grad(self.outputs, self.parameters, curved, retain_graph=True))

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """[..., P] -> pieces [..., *shape]."""
        pieces = vector.split([p.numel() for p in self.parameters], -1)
        return [x.reshape(*vector.shape[:-1], *p.shape) for x, p in zip(pieces, self.parameters, strict=True)]


def flat(pieces: Sequence[Tensor]) -> Tensor:
    """[P]"""
    return torch.cat([piece.reshape(-1) for piece in pieces])
