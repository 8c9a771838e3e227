"""Attaches derivative rules to an op, so that it works under every torch.func transform and under torch.compile.

Why not torch.library.register_autograd: it has no forward mode (a jvp is silently zero) and does not compose with
torch.func. Why not torch.autograd.Function: torch.compile drops or refuses its jvp. Instead, a Python kernel on the
op's Autograd dispatch key runs a *single-level* Function, the class that functorch itself generates. torch.func then
sees an ordinary operator and calls the kernel once per transform level, and compilers keep one opaque node.

This rests on four private names of torch. If a future torch moves them, `derive` reports that the op has no rules, and
callers fall back to the reference formula (slow, never wrong). Each op family tries its rules at the first call under
a transform or a compiler, since rules that torch ignores give zeros, not errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import LIBRARY

try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    _below_autograd = torch._C._AutoDispatchBelowAutograd
    _is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    _make_dual, _unpack_dual = torch._VF._make_dual, torch._VF._unpack_dual
    _transforms_are_active = torch._C._are_functorch_transforms_active
    AVAILABLE = True
except (ImportError, AttributeError):  # a torch that has moved them
    AVAILABLE = False

    def _is_wrapped(tensor: Tensor) -> bool:
        return True  # unknown, so never look at values

    def _transforms_are_active() -> bool:
        return True


class Rules(NamedTuple):
    """An op's derivatives, as plain functions of the op's inputs.

    backward(inputs, needs_grad, *grad_outputs) -> one gradient or None per input
    jvp(inputs, *tangents) -> the output's tangent; a tangent is None where an input has none
    fold: the op's vmap rule, usually from `fold_into_rows`
    """

    backward: Callable[..., Sequence[Tensor | None]]
    jvp: Callable[..., Tensor]
    fold: Callable[..., tuple[Tensor, int]]


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform or a compiler is at work on these tensors: their values may not be there to look at."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0 or any(map(_is_wrapped, tensors))


def any_transform() -> bool:
    """Whether the caller is inside a transform of torch.func, even one that has not touched the tensors at hand."""
    return _transforms_are_active()


def constant_in_graphs(function: Callable[[], Any]) -> Callable[[], Any]:
    """torch.compiler.assume_constant_result, without its import of the compiler (most of a second)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Suspend fake tensors, tracing and whatever other modes a caller has set up around us."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:  # a torch that has moved it
        yield
        return
    with _disable_current_modes():
        yield


def directional_derivative(function: Callable[[Tensor], Tensor], primal: Tensor, tangent: Tensor) -> Tensor:
    """Forward-mode derivative, also inside a forward-mode computation that somebody else has begun."""
    try:
        return torch.func.jvp(function, (primal,), (tangent,))[1]
    except RuntimeError as error:
        if "Nested forward mode" not in str(error):
            raise
        derivative = forward_ad.unpack_dual(function(forward_ad.make_dual(primal, tangent))).tangent
        return torch.zeros(()) if derivative is None else derivative


def push(function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The function's forward-mode derivative inside a jvp rule: on the rule's own level, since none can be added."""
    duals = [_make_dual(primal, tangent, level=0) for primal, tangent in zip(primals, tangents, strict=True)]
    output = function(*duals)
    derivative = _unpack_dual(output, level=0)[1]
    return torch.zeros_like(output) if derivative is None else derivative


def derive(op: Any, rules: Rules) -> None:
    """Give an op derivative and batching rules."""
    if not AVAILABLE:
        return
    function = _single_level_function(op, rules)

    def autograd_kernel(*args: Any) -> Any:
        if _is_tracked(args):
            with enable_single_level_autograd_function():
                return function.apply(*args)
        with _below_autograd():
            return op(*args)

    LIBRARY.impl(op._opname, autograd_kernel, "Autograd")
    torch.library.register_vmap(op.name(), rules.fold, lib=LIBRARY)


def _is_tracked(args: Sequence[Any]) -> bool:
    """Whether anything may be differentiating: `requires_grad` alone would miss transforms and compilers."""
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return True
    grad_mode = torch.is_grad_enabled()
    return any(isinstance(a, Tensor) and ((a.requires_grad and grad_mode) or _is_wrapped(a)) for a in args)


def _single_level_function(op: Any, rules: Rules) -> Any:
    class SingleLevel(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.is_tensor = [isinstance(a, Tensor) for a in args]
            ctx.constants = [None if isinstance(a, Tensor) else a for a in args]
            tensors = [a for a in args if isinstance(a, Tensor)]
            ctx.save_for_forward(*tensors)
            # Function.forward runs with both AD modes off, but outer transform levels need them on.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
                ctx.save_for_backward(*tensors)
                return op(*args)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            inputs = _restore(ctx)
            if grad_outputs[0] is None:
                return (None,) * len(inputs)
            return tuple(rules.backward(inputs, ctx.needs_input_grad, *grad_outputs))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            inputs = _restore(ctx)
            with forward_ad._set_fwd_grad_enabled(True):
                return rules.jvp([_without_tangent(a) for a in inputs], *tangents)

    SingleLevel.__name__ = op._opname
    return SingleLevel


def _restore(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if t else c for t, c in zip(ctx.is_tensor, ctx.constants, strict=True)]


def _without_tangent(value: Any) -> Any:
    # At level 0 by the raw function: Python's own level counter is not set while a compiler traces.
    if isinstance(value, Tensor) and value.is_floating_point():
        return _unpack_dual(value, level=0)[0]
    return value


def fold_into_rows(
    op: Callable[..., Tensor], row_axes: Sequence[int | None], rows_of: int, output_axis: int = 0
) -> Callable[..., tuple[Tensor, int]]:
    """A vmap rule for an op whose rows are independent: B batches of N rows are B * N rows.

    Args:
        op: the op.
        row_axes: for each input, the axis that counts rows, or None where the input has none.
        rows_of: which input says how many rows there are; one with a row axis of 1 row for all is repeated.
        output_axis: the output's axis of rows.
    """

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        in_dims = [dim if isinstance(dim, int) else None for dim in in_dims]  # lists of numbers have lists of None
        dim = in_dims[rows_of]
        axis = row_axes[rows_of]
        assert axis is not None
        sample = args[rows_of] if dim is None else args[rows_of].select(dim, 0)
        rows = sample.shape[axis]
        folded = [
            argument
            if axis is None or argument is None or (dim is None and argument.shape[axis] != rows)
            else _fold(argument, dim, axis, info.batch_size, rows)
            for argument, dim, axis in zip(args, in_dims, row_axes, strict=True)
        ]
        output = op(*folded)
        return output.unflatten(output_axis, (info.batch_size, rows)), output_axis

    return rule


def _fold(argument: Tensor, dim: int | None, axis: int, batch: int, rows: int) -> Tensor:
    shape = list(argument.shape)
    if dim is None:
        batched = argument.unsqueeze(axis).expand(*shape[:axis], batch, *shape[axis:])
    else:
        batched = argument.movedim(dim, axis)
        batched = batched.expand(*batched.shape[: axis + 1], rows, *batched.shape[axis + 2 :])
    # With explicit sizes: of no rows, or no batches, flatten could not know them.
    return batched.reshape(*batched.shape[:axis], batch * rows, *batched.shape[axis + 2 :])
