"""The autograd graph of a forward pass, read from Python: its nodes, what they lead to, and a key of its shape.

Every parameter that takes part is a leaf of this graph, however it got there: by a layer, a functional call, a bare
nn.Parameter, a parametrization, several times. So the graph, not the modules, says where parameters act.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Edge = tuple[int, int]
"""(position of a node, which of its outputs)"""

_LEAF = "torch::autograd::AccumulateGrad"
_REENTRANT = "CheckpointFunctionBackward"


class Graph:
    """Nodes in a fixed order, the edges between them by position, and the chosen parameters among the leaves.

    Args:
        root: a tensor with a graph.
        names: the chosen parameters, id -> name. Other leaves lead nowhere.
    """

    def __init__(self, root: Tensor, names: Mapping[int, str]) -> None:
        assert root.grad_fn is not None
        self.nodes: list[Any] = [root.grad_fn]
        self.root: Edge = (0, root.output_nr)
        self.children: list[list[Edge | None]] = []
        self.leaves: dict[int, str] = {}
        self._known_shapes: dict[Edge, torch.Size] = {}
        position = {root.grad_fn: 0}
        key: list[Any] = [root.output_nr]
        for here, node in enumerate(self.nodes):  # grows while it is walked
            name = node.name()
            key.append(name)
            edges: list[Edge | None] = []
            if name == _LEAF:
                parameter = names.get(id(node.variable))
                key.append(parameter)
                if parameter is not None:
                    self.leaves[here] = parameter
            else:
                for child, output in node.next_functions:
                    if child is None:
                        edges.append(None)
                        key.append(None)
                        continue
                    at = position.get(child)
                    if at is None:
                        at = position[child] = len(self.nodes)
                        self.nodes.append(child)
                    edges.append((at, output))
                    key.append((at, output))
                if name == _REENTRANT:
                    raise ValueError(
                        "the model uses reentrant checkpointing, which hides its layers from the graph; use "
                        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                    )
            self.children.append(edges)
        self.key = tuple(key)

    def name(self, position: int) -> str:
        """What kind of node it is, such as "AddmmBackward0"."""
        return str(self.nodes[position].name())

    def shape(self, edge: Edge) -> torch.Size:
        """The shape of the tensor that a node made."""
        shape = self._known_shapes.get(edge)
        if shape is None:
            shape = self._known_shapes[edge] = torch.Size(self.nodes[edge[0]]._input_metadata[edge[1]].shape)
        return shape

    def outputs(self, position: int) -> int:
        """How many tensors the node made."""
        return len(self.nodes[position]._input_metadata)

    def parameters_below(self) -> list[frozenset[str]]:
        """For each node, the chosen parameters that it leads to."""
        found: list[frozenset[str] | None] = [None] * len(self.nodes)
        for here in self.bottom_up():
            below = [found[edge[0]] for edge in self.children[here] if edge is not None]
            own = {self.leaves[here]} if here in self.leaves else set()
            found[here] = frozenset(own).union(*(names for names in below if names))
        return [names or frozenset() for names in found]

    def bottom_up(self) -> Sequence[int]:
        """Positions, every node after all that it leads to."""
        order: list[int] = []
        state = [0] * len(self.nodes)
        stack = [0]
        while stack:
            here = stack[-1]
            if state[here] == 0:
                state[here] = 1
                stack.extend(edge[0] for edge in self.children[here] if edge is not None and state[edge[0]] == 0)
            else:
                stack.pop()
                if state[here] == 1:
                    state[here] = 2
                    order.append(here)
        return order


def leads_to(tensor: Tensor, names: Mapping[int, str]) -> bool:
    """Whether one of these parameters (id -> name) is among the leaves of a tensor's graph."""
    if id(tensor) in names:
        return True
    stack: list[Any] = [tensor.grad_fn]
    seen = {None, tensor.grad_fn}
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == _LEAF and id(node.variable) in names:
            return True
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return False


@contextlib.contextmanager
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it, hooks on these tensors' gradients stay out: a gradient that is only looked at is none of theirs."""
    hidden = [(hooks, dict(hooks)) for p in parameters if (hooks := getattr(p, "_backward_hooks", None))]
    try:
        for hooks, _ in hidden:
            hooks.clear()
        yield
    finally:
        for hooks, kept in hidden:
            hooks.update(kept)
