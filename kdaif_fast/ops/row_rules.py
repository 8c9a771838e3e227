"""Derivative rules of the row_divergence family.

In the student's logits: row_divergence -> row_divergence_grad -> row_divergence_hvp, each the derivative of the one
before, all of them kernels. In the teacher's logits: the same kernels with the two swapped, where the divergence allows
it. Everything else (third derivatives, learned temperatures or mixtures, soft labels) is the reference, differentiated
by torch: right to every order, and slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _derive
from .._derive import Rules, derive, fold_into_rows
from ..reference import row_divergence as reference
from ..reference import row_terms as terms
from ..reference.row_terms import Choices, accumulation_dtype
from .row_ops import row_divergence, row_divergence_grad, row_divergence_hvp

# The ops' arguments from `student` on, by position.
STUDENT, TEACHER, INDICES, SECOND, LABELS, SOFT_LABELS, CLASS_WEIGHT, MASK, WEIGHT, ROWS, NUMBERS, CHOICES = range(12)
ROW_AXES = (0, 0, 0, 0, 0, 0, None, 0, 0, 1, None, None)
CE, KD, OTHER, INTERPOLATION, SKEW = 1, 2, 3, 5, 8  # in NUMBERS

_Inputs = Sequence[Any]


def _replace(inputs: _Inputs, **changes: Any) -> list[Any]:
    """The inputs, with others at the positions that have these (upper-case) names."""
    changed = list(inputs)
    for name, value in changes.items():
        changed[globals()[name]] = value
    return changed


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    dtype = accumulation_dtype(a)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _scaled_weight(inputs: _Inputs, upstream: Tensor) -> Tensor:
    return upstream if inputs[WEIGHT] is None else upstream * inputs[WEIGHT]


def _as_function_of(
    function: Callable[..., Tensor], inputs: _Inputs, positions: Sequence[int]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def partial(*chosen: Tensor) -> Tensor:
        full = list(inputs)
        for position, value in zip(positions, chosen, strict=True):
            full[position] = value
        return function(*full)

    return partial, [inputs[position] for position in positions]


def _pull_reference(
    function: Callable[..., Tensor], inputs: _Inputs, positions: list[int], upstream: Tensor
) -> list[Tensor]:
    """J^T upstream for the inputs at these positions, by torch's own derivatives of the reference."""
    partial, chosen = _as_function_of(function, inputs, positions)
    output, pull, *_ = torch.func.vjp(partial, *chosen)
    return list(pull(upstream.to(output.dtype)))


def _push_reference(
    function: Callable[..., Tensor], inputs: _Inputs, positions: list[int], tangents: list[Tensor]
) -> Tensor:
    """J tangents for the inputs at these positions, likewise."""
    partial, chosen = _as_function_of(function, inputs, positions)
    return _derive.push(partial, chosen, tangents)


_SWAPPED_KIND = {
    terms.CROSS_ENTROPY: terms.SWAPPED_CROSS_ENTROPY,
    terms.SWAPPED_CROSS_ENTROPY: terms.CROSS_ENTROPY,
    terms.SKEW_FORWARD: terms.SKEW_REVERSE,
    terms.SKEW_REVERSE: terms.SKEW_FORWARD,
}


def _is_symmetric(inputs: _Inputs) -> bool:
    """Whether student and teacher can change places: both are logits over all classes, and nothing else is mixed in."""
    c = Choices(*inputs[CHOICES])
    return (
        c.form == terms.LOGITS
        and c.kind != terms.DECOUPLED
        and not c.mixes
        and c.first_class == 0
        and inputs[TEACHER].shape == inputs[STUDENT].shape
        and inputs[SECOND] is None
        and inputs[ROWS] is None
        and inputs[NUMBERS][INTERPOLATION] == 1
    )


def _swap(inputs: _Inputs) -> list[Any]:
    """The divergence alone, as a function of the teacher's logits: they take the student's place."""
    numbers, choices = list(inputs[NUMBERS]), list(inputs[CHOICES])
    numbers[CE] = 0.0
    kind = choices[0]
    if kind == terms.KL:
        numbers[KD], numbers[OTHER] = numbers[OTHER], numbers[KD]
    elif kind == terms.JENSEN_SHANNON:
        numbers[SKEW] = 1 - numbers[SKEW]
    choices[0] = _SWAPPED_KIND.get(kind, kind)
    return _replace(inputs, STUDENT=inputs[TEACHER], TEACHER=inputs[STUDENT], NUMBERS=numbers, CHOICES=choices)


def _is_linear_in_target(inputs: _Inputs) -> bool:
    """Whether the gradient is that of plain forward KL, (softmax(s / T) - softmax(t / T)) and what multiplies it."""
    kind, numbers = inputs[CHOICES][0], inputs[NUMBERS]
    is_linear = kind == terms.CROSS_ENTROPY or (kind == terms.KL and numbers[OTHER] == 0)
    return is_linear and _is_symmetric(inputs) and inputs[CLASS_WEIGHT] is None


def _mixed_product(inputs: _Inputs, tangent: Tensor) -> Tensor:
    """The derivative of the student's gradient along the teacher, which is symmetric here: minus KL's own Hessian."""
    numbers, choices = list(inputs[NUMBERS]), list(inputs[CHOICES])
    numbers[CE], choices[0] = 0.0, terms.KL
    changed = _replace(inputs, STUDENT=inputs[TEACHER], NUMBERS=numbers, CHOICES=choices)
    return -row_divergence_hvp(tangent[None], False, *changed)[0]


def _differentiable(needs: Sequence[bool], but: Sequence[int]) -> list[int]:
    return [i for i, needed in enumerate(needs) if needed and i not in but]


# --- row_divergence --------------------------------------------------------------------------------------------------


def _loss_backward(inputs: _Inputs, needs: Sequence[bool], grad: Tensor) -> Sequence[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(inputs)
    scaled = _replace(inputs, WEIGHT=_scaled_weight(inputs, grad))
    if needs[STUDENT]:
        grads[STUDENT] = row_divergence_grad(*scaled)
    done = [STUDENT, WEIGHT]
    if needs[TEACHER] and _is_symmetric(inputs):
        grads[TEACHER] = row_divergence_grad(*_swap(scaled))
        done.append(TEACHER)
    if needs[WEIGHT]:
        grads[WEIGHT] = grad * row_divergence(*_replace(inputs, WEIGHT=None))
    rest = _differentiable(needs, done)
    if rest:
        for i, value in zip(rest, _pull_reference(reference.row_divergence, inputs, rest, grad), strict=True):
            grads[i] = value
    return grads


def _loss_jvp(inputs: _Inputs, *tangents: Tensor | None) -> Tensor:
    parts = []
    d_student, d_teacher, d_weight = tangents[STUDENT], tangents[TEACHER], tangents[WEIGHT]
    if d_student is not None:
        parts.append(_row_dot(row_divergence_grad(*inputs), d_student))
    done = [STUDENT, WEIGHT]
    if d_teacher is not None and _is_symmetric(inputs):
        parts.append(_row_dot(row_divergence_grad(*_swap(inputs)), d_teacher))
        done.append(TEACHER)
    if d_weight is not None:
        parts.append(row_divergence(*_replace(inputs, WEIGHT=d_weight)))
    rest = _differentiable([t is not None for t in tangents], done)
    if rest:
        along = [t for i in rest if (t := tangents[i]) is not None]
        parts.append(_push_reference(reference.row_divergence, inputs, rest, along))
    return _total(parts)


# --- row_divergence_grad ---------------------------------------------------------------------------------------------


def _grad_backward(inputs: _Inputs, needs: Sequence[bool], grad: Tensor) -> Sequence[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(inputs)
    done = [STUDENT, WEIGHT]
    if needs[STUDENT]:
        grads[STUDENT] = row_divergence_hvp(grad[None], False, *inputs)[0]
    if needs[WEIGHT]:
        grads[WEIGHT] = _row_dot(row_divergence_grad(*_replace(inputs, WEIGHT=None)), grad)
    if needs[TEACHER] and _is_linear_in_target(inputs):
        grads[TEACHER] = _mixed_product(inputs, grad)
        done.append(TEACHER)
    rest = _differentiable(needs, done)
    if rest:
        for i, value in zip(rest, _pull_reference(reference.row_divergence_grad, inputs, rest, grad), strict=True):
            grads[i] = value
    return grads


def _grad_jvp(inputs: _Inputs, *tangents: Tensor | None) -> Tensor:
    parts, done = [], [STUDENT, WEIGHT]
    d_student, d_teacher, d_weight = tangents[STUDENT], tangents[TEACHER], tangents[WEIGHT]
    if d_student is not None:
        parts.append(row_divergence_hvp(d_student[None], False, *inputs)[0])
    if d_weight is not None:
        parts.append(row_divergence_grad(*_replace(inputs, WEIGHT=d_weight)))
    if d_teacher is not None and _is_linear_in_target(inputs):
        parts.append(_mixed_product(inputs, d_teacher))
        done.append(TEACHER)
    rest = _differentiable([t is not None for t in tangents], done)
    if rest:
        along = [t for i in rest if (t := tangents[i]) is not None]
        parts.append(_push_reference(reference.row_divergence_grad, inputs, rest, along))
    return _total(parts)


# --- row_divergence_hvp(tangents, gauss_newton, student, ...) --------------------------------------------------------

_BEFORE = 2  # arguments before `student`


def _hvp_backward(inputs: _Inputs, needs: Sequence[bool], grad: Tensor) -> Sequence[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(inputs)
    tangents, gauss_newton, *row = inputs
    if needs[0]:
        grads[0] = row_divergence_hvp(grad, gauss_newton, *row)
    if needs[_BEFORE + WEIGHT]:
        unweighted = row_divergence_hvp(tangents, gauss_newton, *_replace(row, WEIGHT=None))
        grads[_BEFORE + WEIGHT] = _row_dot(unweighted, grad).sum(0)
    rest = _differentiable(needs, (0, _BEFORE + WEIGHT))
    if rest:
        for i, value in zip(rest, _pull_reference(reference.row_divergence_hvp, inputs, rest, grad), strict=True):
            grads[i] = value
    return grads


def _hvp_jvp(inputs: _Inputs, *tangents: Tensor | None) -> Tensor:
    parts = []
    primal, gauss_newton, *row = inputs
    d_tangents, d_weight = tangents[0], tangents[_BEFORE + WEIGHT]
    if d_tangents is not None:
        parts.append(row_divergence_hvp(d_tangents, gauss_newton, *row))
    if d_weight is not None:
        parts.append(row_divergence_hvp(primal, gauss_newton, *_replace(row, WEIGHT=d_weight)))
    rest = _differentiable([t is not None for t in tangents], (0, _BEFORE + WEIGHT))
    if rest:
        along = [t for i in rest if (t := tangents[i]) is not None]
        parts.append(_push_reference(reference.row_divergence_hvp, inputs, rest, along))
    return _total(parts)


# --- vmap ------------------------------------------------------------------------------------------------------------


def _fold(
    op: Any,
    formula: Callable[..., Tensor],
    before: int = 0,
    axes_before: tuple[int | None, ...] = (),
    output_axis: int = 0,
) -> Callable[..., tuple[Tensor, int]]:
    """Batches become rows. Class weights are the same for all rows of an op; batches of them go to the reference."""
    at = before + CLASS_WEIGHT
    axes = (*axes_before, *ROW_AXES)
    rows = fold_into_rows(op, axes, before + STUDENT, output_axis)
    weighted_rows = fold_into_rows(formula, (*axes[:at], 0, *axes[at + 1 :]), before + STUDENT, output_axis)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        if in_dims[at] is None:
            return rows(info, in_dims, *args)
        student, dim = args[before + STUDENT], in_dims[before + STUDENT]
        count = (student if dim is None else student.select(dim, 0)).shape[0]
        by_row = args[at].movedim(in_dims[at], 0)[:, None].expand(-1, count, -1)
        return weighted_rows(info, (*in_dims[:at], 0, *in_dims[at + 1 :]), *args[:at], by_row, *args[at + 1 :])

    return rule


_fold_rows_of_products = _fold(row_divergence_hvp, reference.row_divergence_hvp, _BEFORE, (1, None), 1)


def _fold_products(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
    """Batches of tangents alone are more tangents, which share a row's work; else batches become rows."""
    if any(isinstance(dim, int) for dim in in_dims[1:]):
        return _fold_rows_of_products(info, in_dims, *args)
    tangents, *rest = args
    batched = tangents.movedim(in_dims[0], 0)
    B, K = batched.shape[:2]
    products = row_divergence_hvp(batched.reshape(B * K, *batched.shape[2:]), *rest)
    return products.reshape(B, K, *products.shape[1:]), 0


derive(
    row_divergence,
    Rules(_loss_backward, _loss_jvp, _fold(row_divergence, reference.row_divergence)),
)
derive(
    row_divergence_grad,
    Rules(_grad_backward, _grad_jvp, _fold(row_divergence_grad, reference.row_divergence_grad)),
)
derive(row_divergence_hvp, Rules(_hvp_backward, _hvp_jvp, _fold_products))


# --- do they work? ---------------------------------------------------------------------------------------------------


@functools.cache
def _try_rules() -> bool:
    """Try one jvp and one gradient against the reference: rules that a new torch ignores give zeros, not errors."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    student, teacher = torch.tensor([[0.5, -1.0]], **options), torch.tensor([[1.0, 0.25]], **options)
    labels = torch.tensor([1], device="cpu")
    numbers, choices = [2.0, 0.5, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5], [terms.KL, terms.LOGITS, 0, 0, 0, -1, -100]

    def derivatives(formula: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        def loss(s: Tensor) -> Tensor:
            return formula(s, teacher, None, None, labels, None, None, None, None, None, numbers, choices).sum()

        return _derive.directional_derivative(loss, student, teacher), torch.func.grad(loss)(student)

    expected = derivatives(reference.row_divergence)
    try:
        ours = derivatives(row_divergence)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(ours, expected, strict=True))


@_derive.constant_in_graphs
def rules_work() -> bool:
    """Whether this torch follows the derivative rules of this op family; found out at the first question."""
    if not _derive.AVAILABLE:
        return False
    with _derive.without_modes():
        return _try_rules()
