"""The ops of the row_divergence family: schemas, kernels and references. Derivative rules are in row_rules.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._library import define
from ..reference import row_divergence as reference
from ..reference.row_terms import accumulation_dtype
from . import _check

_ARGUMENTS = (
    "Tensor student, Tensor? teacher, Tensor? indices, Tensor? second, Tensor? labels, Tensor? soft_labels, "
    "Tensor? class_weight, Tensor? mask, Tensor? weight, Tensor? rows, float[] numbers, int[] choices"
)


def _checked(formula: Callable[..., Any], student_at: int = 0) -> Callable[..., Any]:
    """The reference as a kernel: a label out of range does what it does in the compiled kernels.

    On the CPU it raises. Elsewhere nobody waits to look at it: its row becomes NaN.
    """

    def kernel(*args: Any) -> Any:
        student, labels, ignore_index = args[student_at], args[student_at + 4], args[-1][-1]
        if labels is None:
            return formula(*args)
        if labels.device.type == "cpu":
            _check.are_labels("row_divergence", "labels", labels, student.shape[1], ignore_index)
            return formula(*args)
        return nan_where_label_is_outside(formula, args, student_at)

    return kernel


def nan_where_label_is_outside(formula: Callable[..., Any], args: Sequence[Any], student_at: int = 0) -> Any:
    """The formula's result, NaN in the rows whose label is outside [0, V); no value is looked at."""
    student, labels, ignore_index = args[student_at], args[student_at + 4], args[-1][-1]
    outside = ((labels < 0) | (labels >= student.shape[1])) & (labels != ignore_index)
    changed = list(args)
    changed[student_at + 4] = labels.masked_fill(outside, 0)
    results = formula(*changed)

    def fill(result: Tensor) -> Tensor:
        is_products = result.dim() == 3  # [K, N, V]
        rows = outside.view(*(1,) * is_products, -1, *(1,) * (result.dim() - 1 - is_products))
        return result.masked_fill(rows, math.nan)

    return tuple(map(fill, results)) if isinstance(results, tuple) else fill(results)


def _new_loss(student: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], dtype=accumulation_dtype(student))


def _new_grad(student: Tensor) -> Tensor:
    return student.new_empty(student.shape)


def _new_products(tangents: Tensor, gauss_newton: bool, student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(tangents.shape)


row_divergence = define(
    f"row_divergence({_ARGUMENTS}) -> Tensor",
    fake=lambda student, *args: _new_loss(student),
    reference=_checked(reference.row_divergence),
    triton="row_divergence",
)
row_divergence_with_grad = define(
    f"row_divergence_with_grad({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda student, *args: (_new_loss(student), _new_grad(student)),
    reference=_checked(reference.row_divergence_with_grad),
    triton="row_divergence",
)
row_divergence_grad = define(
    f"row_divergence_grad({_ARGUMENTS}) -> Tensor",
    fake=lambda student, *args: _new_grad(student),
    reference=_checked(reference.row_divergence_grad),
    triton="row_divergence",
)
row_divergence_hvp = define(
    f"row_divergence_hvp(Tensor tangents, bool gauss_newton, {_ARGUMENTS}) -> Tensor",
    fake=_new_products,
    reference=_checked(reference.row_divergence_hvp, student_at=2),
    triton="row_divergence",
)
