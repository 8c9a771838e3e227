"""Curvature of row losses times several tangents at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _check
from .row_arguments import read_arguments

CURVATURES = ("hessian", "gauss_newton")


def row_hvp(
    tangents: Tensor,
    student_logits: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    curvature: str = "hessian",
    **options: Any,
) -> Tensor:
    """Hessian of each row's row_divergence, in the student's logits, times K tangents: one pass for all of them.

    The exponentials of a row are formed once, whatever K is. Plain distillation (CE and forward KL) needs neither
    teacher nor labels for it, and its rows' temperature cancels against tau^2.

    Args:
        tangents: [K, ..., V], the dtype of the student's logits; or [..., V] for one.
        student_logits, teacher, labels, options: those of row_divergence, but for reduction and normalizer.
        curvature: "hessian", or "gauss_newton": without the curvature of the softmax itself for the divergences that
            are convex in the student's probabilities (reverse KL, Jensen-Shannon, ...): never negative for weights that
            are not. For cross-entropy and forward KL the two are the same.

    Returns:
        The products, shaped like tangents.

    Raises:
        TypeError, ValueError: as row_divergence; tangents of another shape or dtype.

    Memory: the result, and some rows of scratch.

    Source: docs/method.md, section 5.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import row_hvp
        >>> student = torch.zeros(1, 2)
        >>> row_hvp(torch.tensor([[1.0, 0.0]]), student, labels=torch.tensor([0]))
        tensor([[ 0.2500, -0.2500]])
    """
    _check.is_choice("row_hvp", "curvature", curvature, CURVATURES)
    call, _ = read_arguments(student_logits, teacher, labels, **options)
    _check.is_tensor("row_hvp", "tangents", tangents)
    if teacher is None and labels is None and options.get("soft_labels") is None:
        raise ValueError("row_hvp: teacher and labels are None, expected at least one of them")
    student = call.tensors[0]
    if tangents.dtype != student.dtype:
        raise TypeError(f"row_hvp: tangents have dtype {tangents.dtype}, expected {student.dtype}, that of the logits")
    shape = student_logits.shape
    if tangents.shape != shape and tangents.shape[1:] != shape:
        raise ValueError(
            f"row_hvp: tangents have shape {tuple(tangents.shape)}, expected [K, *{tuple(shape)}] or {tuple(shape)}"
        )
    is_one = tangents.shape == shape and tangents.dim() == student_logits.dim()
    count = 1 if is_one else tangents.shape[0]
    products = call.products(tangents.reshape(count, *student.shape), curvature == "gauss_newton")
    return products.reshape(tangents.shape)
