"""One forward pass over a batch, and the backward pass that stops at every place where samples meet parameters."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves, tree_map

from .._model import (
    Batch,
    Loss,
    Params,
    call_model,
    plain_model,
    require_no_batch_statistics,
    sample_losses,
    select_parameters,
    transparent,
    unpack_batch,
)
from .graph import Edge, Graph, leads_to
from .layout import Layout, explains
from .module_rules import Block, module_terms, watched
from .paths import Path, Route
from .plan import Junction, Plan, make_plan
from .probe import NotFiniteError, probe
from .rules import NODE_RULES, Meeting
from .terms import GenericTerm, Term
from .terms.base import NoRule

# Plans of one model: for each mode, choice of parameters and shape of graph (a data-dependent model has several).
_PLANS_KEPT = 32
_SHAPES_KEPT = 256
_plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()

Receive = Callable[[list[tuple[Path, Term]]], None]
"""What to do with the terms of one junction; called while the backward pass goes on."""


class Recording:
    """A model's losses on a batch, with every place where the chosen parameters act on the samples.

    Args:
        model: the model, in whatever mode it is.
        batch: see unpack_batch.
        loss: of each sample.
        params: see select_parameters.
        name: what errors call the batch.
        trains: whether this is a training step, which updates buffers as any does.
        scale: what the losses are multiplied with before the backward pass, a tensor.
        checks: whether to make sure that the loss, too, takes each sample by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss: Loss | None = None,
        params: Params | None = None,
        *,
        name: str = "batch",
        trains: bool = False,
        scale: Tensor | None = None,
        checks: bool = False,
    ) -> None:
        self.model = plain_model(model)
        require_no_batch_statistics(self.model)
        self.parameters = select_parameters(self.model, params)
        self._names = {id(parameter): key for key, parameter in self.parameters.items()}
        self._loss, self._name = loss, name
        self._cuts = False  # whether the walk starts from the outputs, rather than the losses
        with torch.inference_mode(False), torch.enable_grad(), transparent(self.model):
            self._batch = unpack_batch(batch, name)
            with watched(self.model) as calls:
                # DistributedDataParallel expects a backward pass after each of its forward passes.
                called = self.model if trains else _inner(self.model)
                outputs = call_model(called, self._batch.inputs, name, updates_buffers=trains)
            self.losses, self._root, self._cotangent = self._losses(outputs, scale, checks)
            self.samples = len(self.losses)
            self._graph = Graph(self._root, self._names)
            self._blocks = [Block(self._graph, call) for call in calls]
            self._plan = self._find_plan()
        self._paths: dict[Edge, Path] = {}

    def _losses(self, outputs: Any, scale: Tensor | None, checks: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [N]; the tensor that the walk starts from, and the gradient of the summed losses there."""
        if isinstance(outputs, Tensor):
            self._require_leading(len(outputs) if outputs.dim() else None)
            # A cut between model and loss: no need to walk through the loss.
            cut = outputs.detach().requires_grad_()
            losses = sample_losses(self._loss, cut, self._batch, self._name)
            root = outputs
            self._cuts = self._loss is None or not leads_to(losses, self._names)
            if not self._cuts:  # a penalty on weights, or on activations that the model has put somewhere
                losses = root = cut = sample_losses(self._loss, outputs, self._batch, self._name)
        elif self._loss is None:
            raise TypeError(
                f"the model returned a {type(outputs).__name__}, expected a tensor or something with logits; give "
                "loss=, a function (outputs, targets) -> [N] that takes what the model returns"
            )
        else:
            extra = () if self._batch.teacher_logits is None else (self._batch.teacher_logits,)
            losses = root = cut = self._loss(outputs, self._batch.targets, *extra)
            if not isinstance(losses, Tensor) or losses.dim() != 1:
                shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(f"loss returned {shape} for {self._name}, expected one loss per sample, [N]")
            self._require_leading(len(losses))
        if losses.shape[0] == 0:
            raise ValueError(f"{self._name} has no samples")
        if root.grad_fn is None:
            raise ValueError(f"the model's outputs on {self._name} do not depend on the chosen parameters")
        total = losses.sum() if scale is None else losses.sum() * scale
        if root is losses:
            cotangent = torch.ones_like(losses) if scale is None else torch.ones_like(losses) * scale
            return losses.detach(), root, cotangent
        # [T, N, ...] with T = N is the one form that nothing but the values can tell.
        may_be_turned = self._loss is not None and (checks or (cut.dim() > 2 and cut.shape[1] == len(losses)))
        (cotangent,) = torch.autograd.grad(total, cut, retain_graph=may_be_turned)
        if may_be_turned:
            factors = torch.exp2(-(torch.arange(len(losses), device=losses.device) % 8)).to(losses.dtype)
            scaled = (losses * factors).sum() if scale is None else (losses * factors).sum() * scale
            if not explains(Layout(0), cotangent, torch.autograd.grad(scaled, cut)[0], factors):
                raise ValueError(
                    f"loss reads outputs of shape {tuple(cut.shape)} for {self._name} so that the loss of sample i "
                    "depends on more than outputs[i]; expected samples along the first axis, each with its own loss"
                )
        return losses.detach(), root, cotangent

    def _require_leading(self, samples: int | None) -> None:
        for part, value in (("targets", self._batch.targets), ("teacher_logits", self._batch.teacher_logits)):
            if isinstance(value, Tensor) and value.dim() and samples is not None and len(value) != samples:
                raise ValueError(
                    f"{self._name}: {part} have {len(value)} rows, but there are {samples} samples in what the model "
                    "returned; each needs one entry a sample along its first axis"
                )

    # --- the plan ---------------------------------------------------------------------------------------------

    def _find_plan(self) -> Plan:
        known = _plans.setdefault(self.model, {})
        key = self._key(self._graph, self._blocks)
        plan = known.get(key)
        if plan is not None and plan.fits(self._graph, self.samples):
            return plan
        plan = self._plan_from_few(key)
        if plan is None or not plan.lasting or not plan.fits(self._graph, self.samples):
            try:
                found = probe(self._graph, self._root, _some_cotangent(self._root))
            except NotFiniteError as error:
                raise ValueError(
                    f"{error} on {self._name}, so that nothing tells where its samples are: infinity or NaN among the "
                    "inputs or parameters?"
                ) from None
            plan = make_plan(self._graph, found, self.samples, self._blocks)
        else:
            plan.require_same_shapes(self._graph)
        if plan.lasting:
            while len(known) >= _PLANS_KEPT:
                known.pop(next(iter(known)))
            known[key] = plan
        return plan

    def _key(self, graph: Graph, blocks: list[Block]) -> Any:
        """What two passes have in common if a plan for one may be one for the other.

        Axes of length 1 count: [T, N, H] laid out flat looks like [N, H] where T = 1.
        """
        shapes = [x.shape for x in tree_leaves(self._batch.inputs) if isinstance(x, Tensor)]
        ones = tuple(tuple(size == 1 for size in shape) for shape in shapes)
        return graph.key, tuple(block.position for block in blocks), ones

    def _plan_from_few(self, key: Any) -> Plan | None:
        """The plan by probing the same graph on a few samples, which costs little; None if that is not to be had."""
        few = 4 if self.samples == 3 else 3
        sizes = {len(x) for x in tree_leaves(self._batch.inputs) if isinstance(x, Tensor) and x.dim()}
        if self.samples not in sizes:
            return None

        healthy = self.losses.isfinite().nonzero().flatten()
        if not len(healthy):
            return None
        numbers = healthy[torch.arange(few, device=healthy.device) % len(healthy)]

        def pick(x: Any) -> Any:
            chosen = isinstance(x, Tensor) and x.dim() and len(x) == self.samples
            return x.index_select(0, numbers.to(x.device)) if chosen else x

        batch = Batch(*tree_map(pick, tuple(self._batch)))
        devices = sorted({p.device.index for p in self.parameters.values() if p.is_cuda})
        with torch.random.fork_rng(devices):
            try:
                with watched(self.model) as calls:
                    root = call_model(_inner(self.model), batch.inputs, self._name)
                if not self._cuts:
                    assert self._loss is not None
                    extra = () if batch.teacher_logits is None else (batch.teacher_logits,)
                    root = self._loss(root, batch.targets, *extra)
            except Exception:  # not a batch that can be cut so, and it is the model that says how it says that
                return None
        if root.grad_fn is None or not root.dim() or len(root) != few:
            return None
        graph = Graph(root, self._names)
        blocks = [Block(graph, call) for call in calls]
        if self._key(graph, blocks) != key:
            return None
        try:
            found = probe(graph, root, _some_cotangent(root))
        except NotFiniteError:
            return None
        return make_plan(graph, found, few, blocks)

    # --- the backward pass ------------------------------------------------------------------------------------

    def visit(self, receive: Receive, cotangent: Tensor | None = None, *, again: bool = False) -> None:
        """Run the backward pass over the samples' part of the graph, and receive every junction's terms on the way.

        No gradient of a parameter is computed.

        Args:
            receive: called with the terms of each junction.
            cotangent: what to start from instead of the losses' gradient, shaped like `outputs`: terms are then those
                of <cotangent, outputs>.
            again: whether the graph is kept for another visit.
        """
        cotangent = self._cotangent if cotangent is None else cotangent
        plan, graph = self._plan, self._graph
        early = self._early()
        # A node can be run by itself only while no backward pass is under way: junctions without a rule have to wait,
        # and shapes that have not been seen may have some.
        shapes = tuple(graph.shape((junction.node, 0)) for junction in plan.junctions)
        known = plan.generic.get(shapes)
        late = {j.node for j in plan.junctions} if known is None else known
        retain = again or any(j.executed and j.node in late for j in plan.junctions)
        generic: set[int] = set()

        # Called by the backward pass, which is no recorded one, or below, where none is recorded either.
        def terms_of(junction: Junction, grads: tuple[Tensor | None, ...]) -> list[tuple[Path, Term]]:
            terms, is_generic = self._terms(junction, grads, early.get(junction.node))
            if is_generic:
                generic.add(junction.node)
                assert junction.node in late or not junction.executed, "a rule that has become inapplicable"
            return terms

        def arrive(junction: Junction, grads: tuple[Tensor | None, ...]) -> None:
            receive(terms_of(junction, grads))

        waiting: dict[int, list[Tensor | None]] = {}  # by node, in the order in which they came
        handles = []
        ends: list[tuple[Junction, int]] = []
        try:
            for junction in plan.junctions:
                if not junction.executed:
                    ends.extend((junction, output) for output, at in enumerate(junction.layouts) if at is not None)
                elif junction.node in late:
                    hook = functools.partial(lambda node, grads: waiting.__setitem__(node, list(grads)), junction.node)
                    handles.append(graph.nodes[junction.node].register_prehook(hook))
                else:
                    hook = functools.partial(arrive, junction)
                    handles.append(graph.nodes[junction.node].register_prehook(hook))
            edges = [GradientEdge(graph.nodes[junction.node], output) for junction, output in ends]
            caught: tuple[Tensor | None, ...] = ()
            if edges:
                with without_autocast(self.losses.device):
                    caught = torch.autograd.grad(self._root, edges, cotangent, retain_graph=retain, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        postponed: dict[int, list[tuple[Path, Term]]] = {}
        with without_autocast(self.losses.device), torch.no_grad():
            if known is None:
                # In the order in which they will arrive from now on: the last bits of sums depend on it.
                by_node = {junction.node: junction for junction in plan.junctions}
                for node in list(waiting):
                    terms = terms_of(by_node[node], tuple(waiting.pop(node)))
                    if node in generic:
                        postponed[node] = terms
                    else:
                        receive(terms)
            for (junction, output), grad in zip(ends, caught, strict=True):
                waiting.setdefault(junction.node, [None] * len(junction.layouts))[output] = grad
            del caught
            for junction in plan.junctions:
                grads = waiting.pop(junction.node, None)
                if junction.node in postponed:
                    receive(postponed.pop(junction.node))
                elif grads is not None and any(grad is not None for grad in grads):
                    arrive(junction, tuple(grads))
        if known is None:
            while len(plan.generic) >= _SHAPES_KEPT:
                plan.generic.pop(next(iter(plan.generic)))
            plan.generic[shapes] = generic

    def _early(self) -> dict[int, dict[str, Any]]:
        """What checkpointed nodes have saved, by node: it can be read only before the backward pass runs them."""
        found = {}
        for junction in self._plan.junctions:
            node = self._graph.nodes[junction.node]
            rule = NODE_RULES.get(node.name())
            names = () if rule is None else rule.saved
            for name in names:
                raw = getattr(node, f"_raw_saved_{name}", None)
                if isinstance(raw, tuple):  # a list of tensors
                    raw = next((each for each in raw if each is not None), None)
                if _is_checkpointed(raw):
                    found[junction.node] = {each: getattr(node, f"_saved_{each}") for each in names}
                if raw is not None and raw.data is not None:  # a layer's saved tensors are all kept in the same way
                    break
        return found

    def _terms(
        self, junction: Junction, grads: tuple[Tensor | None, ...], saved: dict[str, Any] | None
    ) -> tuple[list[tuple[Path, Term]], bool]:
        """The terms of one junction, with the paths from the parameters; and whether any is generic."""
        if junction.block is not None:
            return module_terms(self._blocks[junction.block], grads[0], junction.layouts[0], self.samples, self), False
        edges, node = junction.edges, self._graph.nodes[junction.node]
        rule, is_generic = NODE_RULES.get(node.name()), False
        terms: Mapping[int, Term] | None = None
        if rule is not None:
            try:
                terms = rule.make(Meeting(node, grads, junction.layouts, self.samples, edges, self._graph, saved))
            except NoRule:
                terms = None
        if terms is None:
            is_generic = True
            grads = tuple(None if at is None else g for g, at in zip(grads, junction.layouts, strict=True))
            shapes = {at: self._graph.shape(edge) for at, edge in edges.items()}
            terms = {at: GenericTerm(node, at, grads, junction.layouts, self.samples, shapes[at]) for at in edges}
        return [(self.path(edges[at]), term) for at, term in terms.items()], is_generic

    def path(self, edge: Edge) -> Path:
        """The path from the parameters to a tensor, made once."""
        if edge not in self._paths:
            route = self._plan.routes.get(edge)
            if route is None:
                route = self._plan.routes[edge] = Route(self._graph, edge)
            self._paths[edge] = Path(self._graph, edge, route, self.parameters)
        return self._paths[edge]

    def leaf(self, name: str) -> Edge:
        """The edge of a parameter."""
        return next((at, 0) for at, leaf in self._graph.leaves.items() if leaf == name)

    @property
    def outputs(self) -> Tensor | None:
        """What the model returned, without its graph; None if the losses depend on more than that one tensor."""
        return self._root.detach() if self._cuts else None

    def losses_of(self, outputs: Tensor) -> Tensor:
        """The samples' losses as a function of the outputs: [N, ...] -> [N]."""
        return sample_losses(self._loss, outputs, self._batch, self._name)

    @property
    def batch(self) -> Batch:
        """The samples."""
        return self._batch

    def reached(self) -> list[Tensor]:
        """The parameters that the losses' graph leads to."""
        return [self.parameters[name] for name in self._graph.leaves.values()]

    def uses(self, name: str) -> int:
        """How many terms there will be for a parameter; none for one that does nothing."""
        return self._plan.uses[name]


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """A backward pass runs in the dtypes that the forward pass chose, even if a caller has not left autocast yet."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _some_cotangent(root: Tensor) -> Tensor:
    """Gradients of about one size, so that no sample goes unseen: those of the loss may be zero."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(root.shape, generator=generator).add_(0.5).to(root)


def _is_checkpointed(raw: Any) -> bool:
    return raw is not None and type(getattr(raw, "data", None)).__module__ == "torch.utils.checkpoint"


def _inner(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
        assert isinstance(model, nn.Module)
    return model
