"""G_i of any other node, by the node's own backward pass: exact, whatever it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._tree import wide_dtype
from ..layout import Layout
from .base import Term


def run_node(node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The node's backward pass by itself: gradients of its outputs -> gradients of its inputs."""
    result = node.apply(*grads) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*grads)
    return result if isinstance(result, tuple) else (result,)


class GenericTerm(Term):
    """The backward pass is linear in the output's gradient b: weights go onto b, directions through its transpose.

    Dots cost the node's backward pass, once more for each direction; a weighted gradient one backward pass; G itself
    one for each sample, as nothing is known of the node.

    Args:
        node: of the autograd graph, which must not have been freed.
        edge: which of its inputs.
        output_grads: b, one tensor for each of the node's outputs.
        layouts: of these; None where there is no gradient.
        samples: N.
        shape: of the input.
    """

    def __init__(
        self,
        node: Any,
        edge: int,
        output_grads: Sequence[Tensor | None],
        layouts: Sequence[Layout | None],
        samples: int,
        shape: torch.Size,
        chosen: range | None = None,
    ) -> None:
        self.node, self.edge, self.output_grads, self.layouts = node, edge, tuple(output_grads), layouts
        self.total, self.shape = samples, shape
        self.chosen = range(samples) if chosen is None else chosen
        self.samples, self.dtype = len(self.chosen), self._first().dtype

    def _scaled(self, weights: Tensor) -> list[Tensor | None]:
        return [
            None if b is None or layout is None else layout.scale(b, weights)
            for b, layout in zip(self.output_grads, self.layouts, strict=True)
        ]

    def _run(self, output_grads: Sequence[Tensor | None]) -> Tensor | None:
        grad = run_node(self.node, output_grads)[self.edge]
        # The engine sums over what was broadcast; here nobody has yet.
        return None if grad is None else grad if grad.is_sparse else grad.sum_to_size(self.shape)

    def _first(self) -> Tensor:
        return next(b for b in self.output_grads if b is not None)

    def weighted(self, weights: Tensor) -> Tensor:
        """See Term."""
        every = weights.new_zeros(self.total)
        every[self.chosen.start : self.chosen.stop] = weights
        grad = self._run(self._scaled(every))
        return self._first().new_zeros(self.shape) if grad is None else grad

    def grads(self, out: Tensor | None = None) -> Tensor:
        """See Term."""
        G = out
        unit = torch.zeros(self.samples, dtype=torch.float32, device=self._first().device)
        for i in range(self.samples):
            unit[i] = 1
            one = self.weighted(unit).to_dense()
            if G is None:
                G = one.new_empty(self.samples, *self.shape)
            G[i] = one
            unit[i] = 0
        return self._first().new_zeros(0, *self.shape) if G is None else G

    def dots(self, directions: Tensor) -> Tensor:
        """See Term."""
        pushed = self._push(directions)
        if pushed is None:  # the backward pass has no derivative of its own
            flat = self.grads().reshape(self.samples, -1)
            wide = wide_dtype(flat.dtype)
            return flat.to(wide) @ directions.reshape(len(directions), -1).to(wide).T
        parts = []
        for tangents in pushed:
            dots: Any = 0
            for b, layout, tangent in zip(self.output_grads, self.layouts, tangents, strict=True):
                if b is not None and layout is not None and tangent is not None:
                    product = (b.conj() * tangent).real if b.is_complex() else b * tangent
                    product = layout.per_sample(product, self.total)
                    dots = dots + product.reshape(self.total, -1).sum(1, dtype=wide_dtype(product.dtype))
            parts.append(dots[self.chosen.start : self.chosen.stop])
        return torch.stack(parts, 1) if parts else self._first().new_zeros(self.samples, 0)

    def _push(self, directions: Tensor) -> list[list[Tensor | None]] | None:
        """How the node's outputs change along each direction: the transpose of its backward pass."""
        with torch.enable_grad():
            cotangents = [
                None if b is None or layout is None else b.detach().requires_grad_()
                for b, layout in zip(self.output_grads, self.layouts, strict=True)
            ]
            grad = self._run(cotangents)
        if grad is None:
            return [[None] * len(cotangents) for _ in directions]
        if not grad.requires_grad or grad.is_sparse:
            return None
        wanted = [u for u in cotangents if u is not None]
        results = []
        try:
            for v in directions:
                found = iter(torch.autograd.grad(grad, wanted, v.to(grad.dtype), retain_graph=True, allow_unused=True))
                tangents = [None if u is None else next(found) for u in cotangents]
                if all(tangent is None for tangent in tangents):  # cut off from b: once_differentiable does that
                    return None
                results.append(tangents)
        except RuntimeError as error:  # once_differentiable, or an op without second derivatives
            if "differentiable" not in str(error) and "derivative" not in str(error):
                raise
            return None
        return results

    def block(self, start: int, stop: int) -> GenericTerm:
        """See Term."""
        chosen = self.chosen[start:stop]
        return GenericTerm(self.node, self.edge, self.output_grads, self.layouts, self.total, self.shape, chosen)
