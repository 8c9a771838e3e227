"""Where in a graph samples meet parameters, and how the samples are laid out there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Size

from .graph import Edge, Graph
from .layout import Layout, Scattered
from .module_rules import Block
from .paths import Route
from .probe import Found, Layouts

# Nodes that may put rows into an order that depends on the data, which then holds for one batch only.
_REORDERING = (
    "Index",
    "Gather",
    "Sort",
    "Topk",
    "Scatter",
    "MaskedSelect",
    "PackPadded",
    "Take",
    "Unique",
    "Nonzero",
    "Segment",
    "Sparse",
)


@dataclass(frozen=True)
class Junction:
    """A node where samples meet parameters.

    Args:
        node: its position in the graph.
        layouts: of each of the node's outputs; None for outputs without gradient.
        edges: of its inputs that come from parameters, directly or through other nodes, by their position.
        executed: whether a backward pass to all junctions runs through it, rather than end there.
        block: which of the modules with a rule of their own it is the output of, if it is.
    """

    node: int
    layouts: tuple[Layout | None, ...]
    edges: dict[int, Edge]
    executed: bool
    block: int | None = None


@dataclass
class Plan:
    """All junctions of a graph, for every graph with the same key.

    Args:
        junctions: in the graph's order.
        uses: how many edges lead to each parameter.
        lasting: whether it holds for later batches too.
        ordered: nodes that keep the samples' order only as long as their indices do.
        routes: from the parameters to the junctions, as far as they have been followed.
        generic: the junctions without a rule, for tensors of shapes that have been tried.
        shared_shapes: of the tensors made of parameters only, at the junctions: they do not change with the batch.
    """

    junctions: list[Junction]
    uses: Counter[str]
    lasting: bool
    ordered: list[int]
    shared_shapes: dict[Edge, Size]
    routes: dict[Edge, Route] = field(default_factory=dict)
    generic: dict[tuple[Size, ...], set[int]] = field(default_factory=dict)

    def fits(self, graph: Graph, samples: int) -> bool:
        """Whether a graph with the same key has tensors that can be laid out so."""
        return all(_takes_samples_in_order(graph, node, samples) for node in self.ordered) and all(
            layout is None or layout.fits(graph.shape((junction.node, output)), samples)
            for junction in self.junctions
            for output, layout in enumerate(junction.layouts)
        )

    def require_same_shapes(self, graph: Graph) -> None:
        """Raise ValueError if something made of parameters only has another shape now: then it is not."""
        for edge, shape in self.shared_shapes.items():
            if graph.shape(edge) != shape:
                raise ValueError(
                    f"the model mixes the samples of a batch at {graph.name(edge[0])} (a tensor of shape "
                    f"{tuple(graph.shape(edge))}), so that no sample has a gradient of its own. Batch statistics? "
                    "Call model.eval(), or use GroupNorm or LayerNorm"
                )


def make_plan(graph: Graph, found: Layouts, samples: int, blocks: Sequence[Block] = ()) -> Plan:
    """Cut the graph where a tensor that belongs to samples is made from one that does not."""
    below = graph.parameters_below()
    lasting, ordered = True, []
    edges: dict[int, dict[int, Edge]] = {}
    shared: dict[Edge, Size] = {}
    uses: Counter[str] = Counter()
    inside = {node for block in blocks for node in block.inside}
    outputs = {block.position[0]: number for number, block in enumerate(blocks)}
    for here in range(len(graph.nodes)):
        layouts = [found.get((here, output)) for output in range(graph.outputs(here))]
        known = [layout for layout in layouts if isinstance(layout, Layout)]
        if not known:
            continue
        if any(isinstance(layout, Scattered) or not layout.certain for layout in known):
            lasting = False
        if graph.name(here).startswith(_REORDERING) and not _is_look_up(graph, here, found):
            if graph.name(here) == "IndexBackward0" and _takes_samples_in_order(graph, here, samples):
                ordered.append(here)
            elif not _is_along_another_axis(graph, here, known[0]):
                lasting = False
        if _mixes_rows(graph, here, found):
            lasting = False
        if here in outputs:
            edges[here] = {}
            uses.update(list(blocks[outputs[here]].parameters))
        if here in inside:
            continue
        chosen: dict[int, Edge] = {}
        for position, edge in enumerate(graph.children[here]):
            if edge is None or not below[edge[0]]:
                continue
            silent = found.get(edge) is Found.SILENT
            # A transpose of a parameter is one whatever its gradient: that of a recurrent weight is zero at first.
            if edge[0] in graph.leaves or found.get(edge) is Found.SHARED or (silent and Route(graph, edge).is_short):
                chosen[position] = edge
                uses.update(below[edge[0]])
                shared[edge] = graph.shape(edge)
            elif silent and _may_meet_parameters(graph, edge, found, below):
                lasting = False
        if chosen:
            edges[here] = chosen
    reached = _leads_to_junction(graph, edges)
    junctions = [
        Junction(
            here,
            tuple(x if isinstance(x := found.get((here, o)), Layout) else None for o in range(graph.outputs(here))),
            chosen,
            any(edge is not None and reached[edge[0]] for edge in graph.children[here]),
            outputs.get(here),
        )
        for here, chosen in edges.items()
    ]
    return Plan(junctions, uses, lasting, ordered, shared)


def _may_meet_parameters(graph: Graph, edge: Edge, found: Layouts, below: Sequence[frozenset[str]]) -> bool:
    """Whether a tensor of which nothing is known may be made from parameters without others that are known in between.

    A gate of a recurrent cell that is times a state of zeros is not: it leads to the cell's product, which is known.
    """
    seen, stack = {edge[0]}, [edge[0]]
    while stack:
        for child in graph.children[stack.pop()]:
            if child is None or not below[child[0]] or isinstance(found.get(child), Layout):
                continue
            if child[0] in graph.leaves or found.get(child) is not Found.SILENT:
                return True
            if child[0] not in seen:
                seen.add(child[0])
                stack.append(child[0])
    return False


def _takes_samples_in_order(graph: Graph, node: int, samples: int) -> bool:
    """Whether x[indices] has x's samples 0, 1, 2, ... in this order, as in logits[arange(N), last_token]."""
    indices = getattr(graph.nodes[node], "_saved_indices", [None])[0]
    if indices is None:
        return True
    return indices.dim() == 1 and torch.equal(indices, torch.arange(samples, device=indices.device))


def _is_look_up(graph: Graph, node: int, found: Layouts) -> bool:
    """Whether a node's rows are those of a parameter, as an embedding's are: no samples are put into another order."""
    edges = [edge for edge in graph.children[node] if edge is not None]
    return all(edge[0] in graph.leaves or found.get(edge) is Found.SHARED for edge in edges)


def _is_along_another_axis(graph: Graph, node: int, layout: Layout) -> bool:
    """Whether a node reorders along one axis, and the samples are along another."""
    axis = getattr(graph.nodes[node], "_saved_dim", None)
    axes = len(graph.shape((node, 0)))
    return axis is not None and axis % (1 << 64) != layout.axis and (axis + axes) % (1 << 64) != layout.axis


def _mixes_rows(graph: Graph, node: int, found: Layouts) -> bool:
    """Whether a matrix product sums over the rows of samples: its other factor says whose they are, and is data."""
    if graph.name(node) not in ("MmBackward0", "AddmmBackward0", "MvBackward0"):
        return False
    left, right = graph.children[node][-2:]
    by_row = isinstance(at := found.get(right) if right else None, Layout) and at.axis == 0
    by_column = isinstance(at := found.get(left) if left else None, Layout) and at.axis == 1
    return by_row or by_column


def _leads_to_junction(graph: Graph, junctions: Container[int]) -> list[bool]:
    reached = [False] * len(graph.nodes)
    for here in graph.bottom_up():
        reached[here] = here in junctions or any(edge is not None and reached[edge[0]] for edge in graph.children[here])
    return reached
