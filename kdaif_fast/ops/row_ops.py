"""The ops of the row_divergence family: schemas, kernels and references. Derivative rules are in row_rules.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import define
from ..reference import row_divergence as reference
from ..reference.row_terms import accumulation_dtype

_ARGUMENTS = (
    "Tensor student, Tensor? teacher, Tensor? indices, Tensor? second, Tensor? labels, Tensor? soft_labels, "
    "Tensor? class_weight, Tensor? mask, Tensor? weight, Tensor? rows, float[] numbers, int[] choices"
)


def _new_loss(student: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], dtype=accumulation_dtype(student))


def _new_grad(student: Tensor) -> Tensor:
    return student.new_empty(student.shape)


def _new_products(tangents: Tensor, gauss_newton: bool, student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(tangents.shape)


row_divergence = define(
    f"row_divergence({_ARGUMENTS}) -> Tensor",
    fake=lambda student, *args: _new_loss(student),
    reference=reference.row_divergence,
    triton="row_divergence",
)
row_divergence_with_grad = define(
    f"row_divergence_with_grad({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda student, *args: (_new_loss(student), _new_grad(student)),
    reference=reference.row_divergence_with_grad,
    triton="row_divergence",
)
row_divergence_grad = define(
    f"row_divergence_grad({_ARGUMENTS}) -> Tensor",
    fake=lambda student, *args: _new_grad(student),
    reference=reference.row_divergence_grad,
    triton="row_divergence",
)
row_divergence_hvp = define(
    f"row_divergence_hvp(Tensor tangents, bool gauss_newton, {_ARGUMENTS}) -> Tensor",
    fake=_new_products,
    reference=reference.row_divergence_hvp,
    triton="row_divergence",
)
