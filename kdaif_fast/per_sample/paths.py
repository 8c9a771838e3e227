"""From the parameters to the tensor that meets the samples: transposes, casts, weight norms, or nothing at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .graph import Edge, Graph, without_hooks

# These rearrange all elements of one tensor, so that gradients keep their norm, and two of them can be joined.
_REARRANGING = {
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "CloneBackward0",
    "AliasBackward0",
    "ToCopyBackward0",
    "NumpyTBackward0",
}


class Route:
    """What nodes lie between the leaves and one tensor made of parameters only: the same for all graphs of one key.

    Attributes:
        names: of the leaves.
        is_short: whether there are only transposes and casts of one parameter.
        transposes: whether these swap rows and columns.
        rearranges: whether it only rearranges (and casts) one parameter.
        chain: the kinds of node, from the tensor to the leaf, if no two paths meet; then which axes they swap.
    """

    def __init__(self, graph: Graph, edge: Edge) -> None:
        chain, axes, here = [], [], edge[0]
        while here not in graph.leaves and len(graph.children[here]) == 1 and graph.children[here][0] is not None:
            chain.append(graph.name(here))
            axes.append(tuple(getattr(graph.nodes[here], f"_saved_{name}", None) for name in ("dim0", "dim1", "dims")))
            here = graph.children[here][0][0]  # type: ignore[index]
        single = here in graph.leaves
        self.names = [graph.leaves[here]] if single else _names_below(graph, edge[0])
        self.is_short = single and all(name in ("TBackward0", "ToCopyBackward0") for name in chain)
        self.transposes = chain.count("TBackward0") % 2 == 1
        self.rearranges = single and all(name in _REARRANGING for name in chain)
        self.chain = (*chain, *axes)


class Path:
    """One route in one graph, with the tensors at its ends.

    Attributes:
        parameters: the leaves, by name.
        leaf: the parameter, if there is nothing but transposes and casts in between; its gradient is `leaf_grad`.
        rearranges: whether it only rearranges (and casts) one parameter.
        transposes: whether these swap the rows and columns of `leaf`.
    """

    def __init__(self, graph: Graph, edge: Edge, route: Route, parameters: Mapping[str, Tensor]) -> None:
        self._at = graph.nodes[edge[0]], edge[1]
        self.parameters = {name: parameters[name] for name in route.names}
        self.rearranges, self._route, self.transposes = route.rearranges, route, route.transposes
        self._simple = route.is_short
        # Straight to the leaf: nothing in between needs to run.
        self.leaf = parameters[route.names[0]] if route.is_short else None

    @property
    def edge(self) -> GradientEdge:
        """The tensor, as autograd's functions take it."""
        return GradientEdge(*self._at)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return torch.Size(self.edge.node._input_metadata[self.edge.output_nr].shape)

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for paths that do the same to the same parameter."""
        return (*self._route.chain, *self.parameters, *self.shape)

    def push(self, directions: Mapping[str, Tensor]) -> Tensor:
        """How the tensor changes along directions in the parameters: {name: [K, *leaf]} -> [K, *shape]."""
        if self._simple:
            (name,) = self.parameters
            return directions[name].mT if self.transposes else directions[name]
        leaves = list(self.parameters.values())
        some = leaves[0]
        with torch.enable_grad(), without_hooks(leaves):
            cotangent = torch.zeros(self.shape, dtype=self._dtype(), device=some.device, requires_grad=True)
            pulled = torch.autograd.grad([self.edge], leaves, [cotangent], create_graph=True, allow_unused=True)
        used = [(name, g) for name, g in zip(self.parameters, pulled, strict=True) if g is not None and g.requires_grad]
        K = len(directions[next(iter(self.parameters))])
        results = []
        for k in range(K):
            along = [directions[name][k].to(g.dtype, copy=True) for name, g in used]  # aligned, for complex views
            results.append(torch.autograd.grad([g for _, g in used], cotangent, along, retain_graph=True)[0])
        return torch.stack(results) if results else cotangent.new_zeros(0, *self.shape)

    def _dtype(self) -> torch.dtype:
        return self.edge.node._input_metadata[self.edge.output_nr].dtype

    def pull(self, grads: Tensor) -> dict[str, Tensor]:
        """Gradients of the tensor taken back to the parameters: [N, *shape] -> {name: [N, *leaf]}."""
        if self._simple:
            return {next(iter(self.parameters)): grads.mT if self.transposes else grads}
        leaves = list(self.parameters.values())
        grads = grads.to(self._dtype())
        with without_hooks(leaves):
            pulled = self._pull(leaves, grads)
        return {name: g for name, g in zip(self.parameters, pulled, strict=True) if g is not None}

    def _pull(self, leaves: list[Tensor], grads: Tensor) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(
                [self.edge], leaves, [grads], retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # an op that cannot be batched
            one_by_one = [
                torch.autograd.grad(
                    [self.edge], leaves, [g], retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for g in grads
            ]
            return [torch.stack(pieces) for pieces in zip(*one_by_one, strict=True)]

    def leaf_grad(self, grad: Tensor) -> Tensor:
        """The gradient of `leaf`, from that of the tensor."""
        assert self.leaf is not None
        return (grad.mT if self.transposes else grad).to(self.leaf.dtype)

    def leaf_view(self, out: Tensor) -> Tensor | None:
        """A buffer [N, *leaf] seen as [N, *shape], if it can be."""
        if not self._simple:
            return None
        return out.mT if self.transposes else out


def _names_below(graph: Graph, start: int) -> list[str]:
    seen, stack, names = {start}, [start], []
    while stack:
        here = stack.pop()
        if here in graph.leaves:
            names.append(graph.leaves[here])
        for edge in graph.children[here]:
            if edge is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return sorted(names)
