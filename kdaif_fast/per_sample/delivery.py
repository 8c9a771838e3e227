"""Handing gradients to the parameters as a backward pass does: accumulated, hooks called, buckets reduced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .paths import Path
from .terms import Term

Terms = list[tuple[Path, Term]]


def deliver(terms: Terms, weights: Tensor, reached: Iterable[Tensor] = ()) -> None:
    """Add sum_i w_i G_i of every term to its parameters' `.grad`. Empties the list: memory is freed on the way.

    Parameters that the graph reaches, but no gradient (behind a layer of zeros), get zeros, as in a backward pass:
    DistributedDataParallel waits for them.
    """
    served = {id(parameter) for path, _ in terms for parameter in path.parameters.values()}
    to_leaves: dict[Tensor, Terms] = {parameter: [] for parameter in reached if id(parameter) not in served}
    terms.reverse()  # in the order they came: the last layers' inputs and output gradients are freed first
    edges: list[GradientEdge] = []
    grads: list[Tensor] = []
    while terms:
        path, term = terms.pop()
        if path.leaf is not None:
            to_leaves.setdefault(path.leaf, []).append((path, term))
        else:
            edges.append(path.edge)
            grads.append(term.weighted(weights))
    roots: list[Any] = [*edges]
    if to_leaves:
        with torch.enable_grad():
            root = _Source.apply(list(to_leaves.values()), weights, *to_leaves)
        to_leaves.clear()
        roots, grads = [root, *edges], [torch.zeros_like(root), *grads]
    if roots:
        torch.autograd.backward(roots, grads)


class _Source(torch.autograd.Function):
    """A node whose backward pass returns the weighted gradients.

    Made there, they have no other owner, so that `.grad` takes their memory over instead of copying it.
    """

    @staticmethod
    def forward(ctx: Any, terms: list[Terms], weights: Tensor, *leaves: Tensor) -> Tensor:
        ctx.terms, ctx.weights, ctx.leaves = terms, weights, leaves
        return weights.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        grads: list[Tensor] = []
        waiting = ctx.terms[::-1]
        del ctx.terms
        for leaf in ctx.leaves:
            here = waiting.pop()
            total = None
            while here:
                path, term = here.pop()
                grad = path.leaf_grad(term.weighted(ctx.weights))
                total = grad if total is None else total + grad
                del term, grad
            grads.append(torch.zeros_like(leaf) if total is None else total)
            del total
        return (None, None, *grads)
