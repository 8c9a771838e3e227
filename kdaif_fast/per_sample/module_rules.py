"""Rules that users give for their own modules, where they know something better than the graph can show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .graph import Edge, Graph
from .layout import Layout
from .terms import Materialised, Term

if TYPE_CHECKING:
    from .paths import Path
    from .recording import Recording

ModuleRule = Callable[[nn.Module, tuple[Any, ...], Tensor], Mapping[str, "Tensor | Term"]]
"""rule(module, inputs, output_grad) -> {name of a parameter of the module: its per-sample gradients}"""

_MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}


def register_rule(layer: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Say how the per-sample gradients of a module's parameters are formed; a decorator.

    No module needs a rule: those without one are taken apart into the operations that PyTorch recorded, and what has
    no fast form is differentiated exactly. A rule pays where a module's parameters act through operations of its own (a
    custom autograd.Function), or where its gradients have a structure that these operations do not show.

    The function gets the module, the positional inputs of its call (detached), and the gradient of every sample's loss
    in the module's output, shaped like the output, samples along the first axis. It returns, for the name of each of
    the module's parameters, either the gradients [N, *parameter.shape] or a Term of kdaif_fast.per_sample.terms, which
    need not form them (a LinearTerm of inputs [N, T, I] and output gradients [N, T, O], say). Names that it leaves out
    count as without gradient. Subclasses of the layer do not inherit its rule.

    Args:
        layer: the module's class. A later rule for the same class replaces an earlier one.

    Raises:
        TypeError: `layer` is not a class of modules.

    Example:
        >>> import torch
        >>> from kdaif_fast.per_sample import per_sample_grads, register_rule
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.factor = torch.nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         return x * self.factor
        >>> @register_rule(Scale)
        ... def scale(module, inputs, output_grad):
        ...     return {"factor": inputs[0] * output_grad}
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> per_sample_grads(Scale(2), batch)["factor"]
        tensor([[-0.2689,  0.0000],
                [ 0.0000, -0.2384]])
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"register_rule: layer is {layer!r}, expected a subclass of torch.nn.Module")

    def register(rule: ModuleRule) -> ModuleRule:
        _MODULE_RULES[layer] = rule
        return rule

    return register


class Call(NamedTuple):
    """One call of a module that has a rule."""

    module: nn.Module
    inputs: tuple[Any, ...]
    output: Tensor


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[Call]]:
    """Within it, calls of modules that have a rule are noted down."""
    calls: list[Call] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} returned a {type(output).__name__}; its rule needs a tensor")
        calls.append(Call(module, inputs, output))

    handles = []
    try:
        if _MODULE_RULES:
            for module in model.modules():
                if type(module) in _MODULE_RULES:
                    handles.append(module.register_forward_hook(note))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Block:
    """The part of a graph that one such call has made.

    Attributes:
        position: the edge of the call's output.
        inside: the nodes between the call's inputs and its output.
        parameters: of the module, among the graph's: by their name in the model, with their name in the module.
    """

    def __init__(self, graph: Graph, call: Call) -> None:
        self.module, self.inputs = call.module, call.inputs
        numbers = {id(node): at for at, node in enumerate(graph.nodes)}
        at = numbers.get(id(call.output.grad_fn))
        self.position: Edge = (-1 if at is None else at, call.output.output_nr)
        before = {numbers.get(id(x.grad_fn)) for x in call.inputs if isinstance(x, Tensor) and x.grad_fn is not None}
        self.inside: set[int] = set()
        stack = [] if at is None else [at]
        while stack:
            here = stack.pop()
            if here in self.inside or here in before:
                continue
            self.inside.add(here)
            stack.extend(edge[0] for edge in graph.children[here] if edge is not None)
        own = {id(parameter): name for name, parameter in call.module.named_parameters()}
        self.parameters: dict[str, str] = {
            graph.leaves[here]: own[id(graph.nodes[here].variable)]
            for here in self.inside
            if here in graph.leaves and id(graph.nodes[here].variable) in own
        }


def module_terms(
    block: Block, output_grad: Tensor | None, layout: Layout | None, samples: int, recording: Recording
) -> list[tuple[Path, Term]]:
    """The terms of one call, by the rule of its module."""
    kind = type(block.module).__name__
    if output_grad is None:
        return []
    if layout != Layout(0) or len(output_grad) != samples:
        raise ValueError(
            f"the output of {kind} is {tuple(output_grad.shape)} for {samples} samples: a module with a rule of its "
            "own needs samples along the first axis"
        )
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in block.inputs)
    result = _MODULE_RULES[type(block.module)](block.module, inputs, output_grad)
    parameters = dict(block.module.named_parameters())
    unknown = sorted(set(result) - set(parameters))
    if unknown:
        raise ValueError(f"the rule of {kind} returned gradients of {unknown}, which are none of its parameters")
    terms = []
    for name, local in block.parameters.items():
        value = result.get(local)
        if value is None:
            continue
        term = Materialised(value) if isinstance(value, torch.Tensor) else value
        expected = (samples, *parameters[local].shape)
        if (term.samples, *term.shape) != expected:
            raise ValueError(
                f"the rule of {kind} returned {(term.samples, *term.shape)} for {local!r}, expected {expected}"
            )
        terms.append((recording.path(recording.leaf(name)), term))
    return terms
