"""Finding out where the samples are in every gradient of a graph, by scaling the samples' losses.

Scale sample i's loss by c_i: what belongs to sample i alone grows by exactly c_i, wherever it is, and what sums over
samples (the gradient of a parameter, or of something made of parameters only) by no such factor. So one backward pass
more says of every tensor in the graph how the samples are laid out in it. It is exact, whatever the layers are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .graph import Edge, Graph, without_hooks
from .layout import Layout, Scattered, explains, find_layouts, find_owners, uncertain


class Found(Enum):
    """What the probe says of a tensor that has no layout."""

    SHARED = "its gradient sums over samples: it is made of parameters only"
    SILENT = "its gradient is zero, so nothing can be said"


Layouts = dict[Edge, "Layout | Found"]


class NotFiniteError(ValueError):
    """A gradient is infinite or NaN, of which no factor can be seen."""


def probe(graph: Graph, root: Tensor, cotangent: Tensor) -> Layouts:
    """The layout of every tensor in the graph that gets a gradient; the graph is kept.

    Args:
        graph: of root.
        root: [N, ...].
        cotangent: shaped like root, its part of sample i scaled with the sample.
    """
    samples = len(root)
    generator = torch.Generator().manual_seed(0)
    exponents = -torch.randint(6, (samples,), generator=generator)  # downwards: half precision overflows sooner
    exponents[torch.randperm(samples, generator=generator)[:3]] = torch.tensor([0, -2, -4])[:samples]
    exponents = exponents.to(root.device)
    plain = gradients(graph, root, cotangent)
    scaled = gradients(graph, root, Layout(0).scale(cotangent, torch.exp2(exponents)))
    found: Layouts = {}
    candidates: dict[Edge, list[Layout]] = {}
    for edge, values in plain.items():
        if values.numel() == 0 or not values.any():
            found[edge] = Found.SILENT
            continue
        if not values.isfinite().all():
            raise NotFiniteError(f"gradients at {graph.name(edge[0])} are not finite")
        candidates[edge] = find_layouts(values, scaled[edge], exponents)
        found[edge] = candidates[edge][0] if candidates[edge] else Found.SHARED
    several = {edge: layouts for edge, layouts in candidates.items() if len(layouts) > 1}
    unclear = {e: plain[e] for e, layouts in candidates.items() if len(layouts) != 1}
    return found | _by_number(graph, root, cotangent, unclear, several)


def _by_number(
    graph: Graph, root: Tensor, cotangent: Tensor, plain: dict[Edge, Tensor], several: dict[Edge, list[Layout]]
) -> Layouts:
    """What only the samples' numbers tell, one bit a pass: rows in no order, and layouts that few gradients tell apart.

    Args:
        graph, root, cotangent: see probe.
        plain: the gradients of the tensors in question.
        several: the layouts of those that have more than one.
    """
    samples = len(root)
    numbers = torch.arange(samples, device=root.device)
    # A tensor that sums over samples is scaled by no power of two when samples 1, 3, 5, ... count half: that is cheap
    # to rule out.
    axes = {e: range(1, x.dim() + 1) if e not in several else range(0) for e, x in plain.items()}
    rows = {(e, k): x for e, x in plain.items() for k in axes[e]}
    passes = []
    for bit in range(max(1, (samples - 1).bit_length())):
        if not rows and not several:
            break
        factors = 1 - 0.5 * (numbers >> bit & 1)
        halved = gradients(graph, root, Layout(0).scale(cotangent, factors))
        rows = {(e, k): x for (e, k), x in rows.items() if find_owners(x, [halved[e]], k) is not None}
        several = {
            e: [layout for layout in layouts if explains(layout, plain[e], halved[e], factors)] or layouts[:1]
            for e, layouts in several.items()
        }
        passes.append(halved)
    found: Layouts = {e: layouts[0] if len(layouts) == 1 else uncertain(layouts[0]) for e, layouts in several.items()}
    for (e, k), x in rows.items():
        owner = find_owners(x, [p[e] for p in passes], k) if e not in found else None
        if owner is not None:
            found[e] = Scattered(owner)
    return found


def gradients(graph: Graph, root: Tensor, cotangent: Tensor) -> dict[Edge, Tensor]:
    """The gradient of every tensor in the graph that gets one."""
    caught: dict[Edge, Tensor] = {}

    def catch(position: int) -> Any:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            for output, grad in enumerate(grads):
                if grad is not None:
                    caught[position, output] = grad.detach()

        return hook

    inner = [at for at in range(len(graph.nodes)) if at not in graph.leaves and hasattr(graph.nodes[at], "name")]
    with contextlib.ExitStack() as stack:
        for at in inner:
            if graph.children[at]:
                stack.enter_context(_removed(graph.nodes[at].register_prehook(catch(at))))
        stack.enter_context(without_hooks([graph.nodes[at].variable for at in graph.leaves]))
        leaves = [GradientEdge(graph.nodes[at], 0) for at in graph.leaves]
        torch.autograd.grad(root, leaves, cotangent, retain_graph=True, allow_unused=True)
    return caught


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
