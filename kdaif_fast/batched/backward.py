"""K backward passes through a kept graph at once: its nodes are walked once, each takes all K cotangents.

PyTorch's engine walks a graph for one cotangent. Its is_grads_batched (vmap) has no rules for some nodes, fails at the
second derivative of group normalisation (torch 2.13), and makes grouped convolutions, which are slower than a loop.
Here a node has a rule of this library, or is called once per vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .rules import ELEMENTWISE, RULES
from .terms import Sum, Term, reduced

_LEAF = "torch::autograd::AccumulateGrad"
_TRANSPOSE = "TBackward0"
# Nodes whose work the engine alone knows: hooks of modules are called, in-place writes to views are undone.
_ENGINE_ONLY = ("BackwardHookFunctionBackward", "CopySlices", "CheckpointFunctionBackward")

CACHED = 16 << 20
"""Bytes of cotangents that one walk holds on a CPU: what stays in the caches, and in memory that is there already."""


class NotBatchableError(Exception):
    """The engine itself has to walk this graph."""


class _Edge(NamedTuple):
    """Where a gradient goes."""

    step: int  # position of the receiving node in the walk; -1: it is a wanted gradient
    slot: int  # which of that node's cotangents, or which wanted gradient
    transposed: bool  # through an odd number of transpositions
    shape: torch.Size  # of the gradient as it leaves, before these
    dtype: torch.dtype


class _Step(NamedTuple):
    node: Any
    kind: str
    edges: list[_Edge | None]
    wanted: list[torch.Size | None]
    slots: list[Any]  # shape and dtype of each cotangent


class BatchedBackward:
    """The map from cotangents of `outputs` to gradients of the leaves `inputs`, for K of them at once.

    Args:
        outputs: tensors with a graph, which has to be kept.
        inputs: leaves.

    Raises:
        NotBatchableError: the graph has nodes that only PyTorch's engine can walk.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._leaves = {get_gradient_edge(leaf).node: position for position, leaf in enumerate(inputs)}
        roots = [get_gradient_edge(output) for output in outputs]
        nodes = _walk([root.node for root in roots], self._leaves)
        steps = [node for node in nodes if node.name() not in (_LEAF, _TRANSPOSE)]
        self._position = {node: position for position, node in enumerate(steps)}
        self._useful = set(nodes)
        self._count = len(inputs)
        self._roots = [self._edge(root.node, root.output_nr) for root in roots]
        self._steps = [self._step(node) for node in steps]
        self.kinds = frozenset(step.kind for step in self._steps)
        self.vector_bytes = self._peak()

    def _step(self, node: Any) -> _Step:
        edges = [self._edge(child, slot) for child, slot in node.next_functions]
        return _Step(
            node, node.name(), edges, [None if edge is None else edge.shape for edge in edges], node._input_metadata
        )

    def _edge(self, node: Any, slot: int) -> _Edge | None:
        """The edge, past transpositions of matrices, which are done on the way."""
        if node is None or node not in self._useful:
            return None
        made = node._input_metadata[slot]
        transposed = False
        while node.name() == _TRANSPOSE:
            node, slot = node.next_functions[0]
            transposed = not transposed
        step, slot = (-1, self._leaves[node]) if node.name() == _LEAF else (self._position[node], slot)
        shape = torch.Size(made.shape)
        return _Edge(step, slot, transposed and len(shape) == 2, shape, made.dtype)

    def _peak(self) -> int:
        """The most bytes of cotangents and gradients at any time, per vector."""
        waiting: dict[tuple[int, int], int] = {}
        for edge in self._roots:
            if edge is not None and edge.step >= 0:
                waiting[edge.step, edge.slot] = _bytes(edge)
        peak = sum(waiting.values())
        for position, step in enumerate(self._steps):
            made = {(e.step, e.slot): _bytes(e) for e in step.edges if e is not None and e.step >= 0}
            # What a rule needs for itself is about what it gives.
            largest = max((_bytes(e) for e in step.edges if e is not None), default=0)
            waiting = {key: waiting.get(key, 0) or made[key] for key in waiting.keys() | made.keys()}
            peak = max(peak, sum(waiting.values()) + largest)
            waiting = {key: size for key, size in waiting.items() if key[0] != position}
        return peak

    def at_once(self, device: torch.device) -> int:
        """How many vectors one walk takes: on a CPU those whose cotangents stay in its caches."""
        return max(1, CACHED // max(1, self.vector_bytes)) if device.type == "cpu" else 1 << 30

    def __call__(self, cotangents: Sequence[Tensor], targets: Sequence[Tensor] | None = None) -> list[Tensor | None]:
        """Gradients [K, *shape] of every input, None where the outputs do not depend on it.

        Args:
            cotangents: [K, *shape] for every output.
            targets: where the gradients are to be written, [K, *shape] of a dtype at least as wide.
        """
        sums = [Sum(None if targets is None else targets[i]) for i in range(self._count)]
        waiting: dict[int, list[Sum | None]] = {}
        with torch.no_grad():
            for root, cotangent in zip(self._roots, cotangents, strict=True):
                self._send(root, cotangent, waiting, sums)
            for position, step in enumerate(self._steps):
                arrived = waiting.pop(position, None)
                if arrived is None:
                    continue
                gradients = _call(step, [None if x is None else x.total for x in arrived])
                del arrived
                for edge, gradient in zip(step.edges, gradients, strict=True):
                    if edge is not None and gradient is not None:
                        self._send(edge, gradient, waiting, sums)
                del gradients
        return [x.total for x in sums]

    def _send(self, edge: _Edge | None, term: Term, waiting: dict[int, list[Sum | None]], sums: list[Sum]) -> None:
        if edge is None:
            return
        if isinstance(term, Tensor):
            term = reduced(term.to_dense() if term.is_sparse else term, edge.shape)
            if term.dtype != edge.dtype:
                term = term.to(edge.dtype)
        if edge.transposed:
            term = term.mT
        if edge.step < 0:
            sums[edge.slot].add(term)
            return
        slots = waiting.setdefault(edge.step, [None] * len(self._steps[edge.step].slots))
        total = slots[edge.slot]
        if total is None:
            total = slots[edge.slot] = Sum()
        total.add(term)


def _bytes(edge: _Edge) -> int:
    return edge.shape.numel() * edge.dtype.itemsize


def _walk(roots: Sequence[Any], leaves: dict[Any, int]) -> list[Any]:
    """The nodes from which a leaf is reached, each before those that it leads to."""
    leads: dict[Any, bool] = {}
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, is_done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if is_done:
            if node not in leads:
                leads[node] = node in leaves or any(leads[child] for child in children)
                if leads[node]:
                    _require_plain(node)
                    order.append(node)
        elif node not in leads:
            stack.append((node, True))
            stack += [(child, False) for child in children if child not in leads]
    return order[::-1]


def _require_plain(node: Any) -> None:
    name = node.name()
    if name in _ENGINE_ONLY:
        raise NotBatchableError(f"{name} is for PyTorch's engine")
    if name == _LEAF:
        return
    for slot in node._input_metadata:
        if not slot.dtype.is_floating_point or slot.is_nested_tensor:
            raise NotBatchableError(f"{name} gives {slot.dtype}")


def _call(step: _Step, cotangents: list[Tensor | None]) -> Sequence[Term | None]:
    rule = RULES.get(step.kind)
    if rule is not None:
        return rule(step.node, cotangents, step.wanted)
    count = len(next(c for c in cotangents if c is not None))
    if step.kind in ELEMENTWISE and all(c is not None for c in cotangents):
        return _as_tuple(step.node(*cotangents))
    call = step.node
    if not step.kind.endswith(tuple("0123456789")):  # of Python: the C++ code around it fills in zeros
        call = getattr(step.node, "apply", step.node)
        cotangents = [
            torch.zeros((count, *slot.shape), dtype=slot.dtype, device=slot.device) if c is None else c
            for c, slot in zip(cotangents, step.slots, strict=True)
        ]
    rows = [_as_tuple(call(*(None if c is None else c[k] for c in cotangents))) for k in range(count)]
    return [_stacked([row[i] for row in rows], edge) for i, edge in enumerate(step.edges)]


def _stacked(gradients: list[Tensor | None], edge: _Edge | None) -> Tensor | None:
    present = [
        gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients if gradient is not None
    ]
    if edge is None or not present:
        return None
    if len(present) < len(gradients):
        raise NotBatchableError("a node gives gradients for some vectors only")
    return present[0][None] if len(present) == 1 else torch.stack(present)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
