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
import math
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
    _unpack_dual = torch._VF._unpack_dual
    AVAILABLE = True
except (ImportError, AttributeError):  # a torch that has moved them
    AVAILABLE = False

    def _is_wrapped(tensor: Tensor) -> bool:
        return True  # unknown, so never look at values


class Rules(NamedTuple):
    """An op's derivatives, as plain functions of the op's inputs.

    backward(inputs, needs_grad, *grad_outputs) -> one gradient or None per input
    jvp(inputs, *tangents) -> the output's tangent; a tangent is None where an input has none
    row_inputs: for each input, whether its first axis counts rows; how vmap folds a batch into more rows
    with_grad: optional; an op with the same inputs that returns (output, d output / d first input, row by row). An
        eager call that will be differentiated uses it, so that the usual single backward pass costs a scaling.
    """

    backward: Callable[..., Sequence[Tensor | None]]
    jvp: Callable[..., Tensor]
    row_inputs: Sequence[bool]
    with_grad: Any = None


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform or a compiler is at work on these tensors: their values may not be there to look at."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0 or any(map(_is_wrapped, tensors))


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
    torch.library.register_vmap(op.name(), _fold_into_rows(op, rules.row_inputs), lib=LIBRARY)


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
                if rules.with_grad is not None and _is_plain_backward(args):
                    output, grad = rules.with_grad(*args)
                    ctx.save_for_backward(*tensors, grad)
                    return output
                ctx.save_for_backward(*tensors)
                return op(*args)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            inputs, grad = _restore(ctx)
            if grad_outputs[0] is None:
                return (None,) * len(inputs)
            if grad is not None and not torch.is_grad_enabled() and sum(ctx.needs_input_grad) == 1:
                scaled = _scale_rows(grad_outputs[0], grad)
                if scaled is not None:
                    return (scaled, *(None,) * (len(inputs) - 1))
            return tuple(rules.backward(inputs, ctx.needs_input_grad, *grad_outputs))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            inputs, _ = _restore(ctx)
            with forward_ad._set_fwd_grad_enabled(True):
                return rules.jvp([_without_tangent(a) for a in inputs], *tangents)

    SingleLevel.__name__ = op._opname
    return SingleLevel


def _restore(ctx: Any) -> tuple[list[Any], Tensor | None]:
    saved = list(ctx.saved_tensors)
    count = sum(ctx.is_tensor)
    tensors = iter(saved[:count])
    inputs = [next(tensors) if t else c for t, c in zip(ctx.is_tensor, ctx.constants, strict=True)]
    return inputs, saved[count] if len(saved) > count else None


def _without_tangent(value: Any) -> Any:
    # At level 0 by the raw function: Python's own level counter is not set while a compiler traces.
    if isinstance(value, Tensor) and value.is_floating_point():
        return _unpack_dual(value, level=0)[0]
    return value


def _is_plain_backward(args: Sequence[Any]) -> bool:
    """Whether this is ordinary eager training on the CPU, with a gradient wanted for the first input only.

    On a GPU bytes are the cost, and forming the gradient early saves none: recomputing reads what scaling would.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    first = tensors[0]
    return (
        first.requires_grad
        and first.device.type == "cpu"
        and all(type(t) in (Tensor, torch.nn.Parameter) and not _is_wrapped(t) for t in tensors)
        and not any(t.requires_grad for t in tensors[1:])
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
    )


def _scale_rows(factors: Tensor, rows: Tensor) -> Tensor | None:
    """factors[i] * rows[i], without a pass over the rows if every factor is the same 1 (a sum or mean of losses).

    None where scaling would round a second time (bfloat16, float16, unless by a power of two, as loss scalers do): the
    caller then recomputes.
    """
    exact = factors.dtype == rows.dtype
    if factors.stride(0) == 0 and factors.shape[0]:
        try:
            factor = factors[0].item()
        except RuntimeError:  # a batch of gradients under autograd's own vmap, which has no single value
            factor = math.nan
        if factor == 1:
            return rows
        exact |= math.frexp(factor)[0] == 0.5
    return (factors[:, None] * rows).to(rows.dtype) if exact else None


def _fold_into_rows(op: Any, row_inputs: Sequence[bool]) -> Callable[..., tuple[Tensor, int]]:
    """A vmap rule for an op whose rows are independent: B batches of N rows are B * N rows."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        folded = []
        for argument, dim, has_rows in zip(args, in_dims, row_inputs, strict=True):
            if has_rows:
                batched = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
                rows = batched.shape[1]
                argument = batched.reshape(info.batch_size * rows, *batched.shape[2:])
            folded.append(argument)
        output = op(*folded)
        return output.reshape(info.batch_size, rows, *output.shape[1:]), 0

    return rule
