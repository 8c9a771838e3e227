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

from .graph import Edge, Graph
from .layout import Layout, Scattered, find_layout, find_owners


class Found(Enum):
    """What the probe says of a tensor that has no layout."""

    SHARED = "its gradient sums over samples: it is made of parameters only"
    SILENT = "its gradient is zero, so nothing can be said"


Layouts = dict[Edge, "Layout | Found"]


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
    for edge, values in plain.items():
        if values.numel() == 0 or not values.any():
            found[edge] = Found.SILENT
        else:
            found[edge] = find_layout(values, scaled[edge], exponents) or Found.SHARED
    return found | _scattered(graph, root, cotangent, {e: plain[e] for e, f in found.items() if f is Found.SHARED})


def _scattered(graph: Graph, root: Tensor, cotangent: Tensor, plain: dict[Edge, Tensor]) -> Layouts:
    samples = len(root)
    numbers = torch.arange(samples, device=root.device)
    # A row of a shared tensor is scaled by no power of two when samples 1, 3, 5, ... count half: cheap to rule out.
    candidates, passes = plain, []
    for bit in range(max(1, (samples - 1).bit_length())):
        halved = gradients(graph, root, Layout(0).scale(cotangent, 1 - 0.5 * (numbers >> bit & 1)))
        candidates = {e: x for e, x in candidates.items() if find_owners(x, [halved[e]]) is not None}
        if not candidates:
            return {}
        passes.append(halved)
    owners = {edge: find_owners(x, [p[edge] for p in passes]) for edge, x in candidates.items()}
    return {edge: Scattered(owner) for edge, owner in owners.items() if owner is not None}


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
        leaves = [GradientEdge(graph.nodes[at], 0) for at in graph.leaves]
        torch.autograd.grad(root, leaves, cotangent, retain_graph=True, allow_unused=True)
    return caught


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
