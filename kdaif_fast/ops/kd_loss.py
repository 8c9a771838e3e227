"""kd_loss: the weighted distillation loss of each row, with closed-form first and second derivatives.

    l = weight * (alpha CE(y, s) + (1 - alpha) T^2 KL(softmax(t / T) || softmax(s / T)))

Four ops of one family: `kd_loss`, `kd_loss_grad` and `kd_loss_hvp` are each other's derivatives, `kd_loss_with_grad`
is the first two in one pass over the logits. The gradient with respect to the teacher, and third derivatives, are
plain torch (reference/kd_loss.py), which torch differentiates further by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _derive
from .._derive import Rules, derive
from .._library import define
from ..reference import kd_loss as reference
from . import _check

REDUCTIONS = ("none", "sum", "mean")


def _new_loss(student: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], dtype=reference.accumulation_dtype(student))


def _on_rows(formula: Callable[..., Any], labels_at: int) -> Callable[..., Any]:
    """The reference as a kernel: a label out of range does what it does in the compiled kernels.

    On the CPU it raises. Elsewhere nobody waits to look at it: its row becomes NaN.
    """

    def kernel(*args: Any) -> Any:
        student, labels = args[labels_at - 2], args[labels_at]
        if labels.device.type == "cpu":
            _check.are_labels("kd_loss", "labels", labels, student.shape[1])
            return formula(*args)
        return nan_where_label_is_outside(formula, args, labels_at)

    return kernel


def nan_where_label_is_outside(formula: Callable[..., Any], args: Sequence[Any], labels_at: int) -> Any:
    """The formula's result, NaN in the rows whose label is outside [0, V); no value is looked at."""
    classes, labels = args[labels_at - 2].shape[1], args[labels_at]
    outside = (labels < 0) | (labels >= classes)
    results = formula(*args[:labels_at], labels.clamp(0, classes - 1), *args[labels_at + 1 :])
    filled = [
        result.masked_fill(outside.view(-1, *(1,) * (result.dim() - 1)), math.nan)
        for result in (results if isinstance(results, tuple) else (results,))
    ]
    return tuple(filled) if isinstance(results, tuple) else filled[0]


_SHARED = "Tensor student_logits, Tensor teacher_logits, Tensor labels"
_OPTIONS = "float temperature, float alpha"

_kd_loss = define(
    f"kd_loss({_SHARED}, Tensor weight, {_OPTIONS}) -> Tensor",
    fake=lambda student, teacher, labels, weight, T, alpha: _new_loss(student),
    triton="kd_loss",
    reference=_on_rows(reference.kd_loss, labels_at=2),
)
_kd_loss_with_grad = define(
    f"kd_loss_with_grad({_SHARED}, Tensor weight, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda student, teacher, labels, weight, T, alpha: (_new_loss(student), student.new_empty(student.shape)),
    triton="kd_loss",
    reference=_on_rows(reference.kd_loss_with_grad, labels_at=2),
)
_kd_loss_grad = define(
    f"kd_loss_grad(Tensor grad_output, {_SHARED}, {_OPTIONS}) -> Tensor",
    fake=lambda grad_output, student, teacher, labels, T, alpha: student.new_empty(student.shape),
    triton="kd_loss",
    reference=_on_rows(reference.kd_loss_grad, labels_at=3),
)
_kd_loss_hvp = define(
    f"kd_loss_hvp(Tensor grad_output, Tensor tangent, Tensor student_logits, {_OPTIONS}) -> Tensor",
    fake=lambda grad_output, tangent, student, T, alpha: student.new_empty(student.shape),
    triton="kd_loss",
    reference=reference.kd_loss_hvp,
)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    dtype = reference.accumulation_dtype(a)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def _total(*parts: Tensor | None) -> Tensor:
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0])


def _loss_backward(inputs: Sequence[Any], needs: Sequence[bool], grad: Tensor) -> Sequence[Tensor | None]:
    student, teacher, labels, weight, T, alpha = inputs
    d_student = d_teacher = d_weight = None
    if needs[0]:
        d_student = _kd_loss_grad(grad * weight, student, teacher, labels, T, alpha)
    if needs[1]:
        d_teacher = reference.kd_loss_teacher_grad(grad * weight, student, teacher, T, alpha)
    if needs[3]:
        d_weight = grad * _kd_loss(student, teacher, labels, torch.ones_like(weight), T, alpha)
    return d_student, d_teacher, None, d_weight, None, None


def _loss_jvp(inputs: Sequence[Any], *tangents: Tensor | None) -> Tensor:
    student, teacher, labels, weight, T, alpha = inputs
    d_student, d_teacher, _, d_weight, *_ = tangents
    along_student = along_teacher = along_weight = None
    if d_student is not None:
        along_student = _row_dot(_kd_loss_grad(weight, student, teacher, labels, T, alpha), d_student)
    if d_teacher is not None:
        along_teacher = _row_dot(reference.kd_loss_teacher_grad(weight, student, teacher, T, alpha), d_teacher)
    if d_weight is not None:
        along_weight = d_weight * _kd_loss(student, teacher, labels, torch.ones_like(weight), T, alpha)
    return _total(along_student, along_teacher, along_weight)


def _grad_backward(inputs: Sequence[Any], needs: Sequence[bool], grad: Tensor) -> Sequence[Tensor | None]:
    upstream, student, teacher, labels, T, alpha = inputs
    d_upstream = d_student = d_teacher = None
    if needs[0]:
        d_upstream = _row_dot(_kd_loss_grad(torch.ones_like(upstream), student, teacher, labels, T, alpha), grad)
    if needs[1]:
        d_student = _kd_loss_hvp(upstream, grad, student, T, alpha)
    if needs[2]:  # the teacher enters as -(1 - alpha) T softmax(t / T), whose Jacobian is the KL part's Hessian
        d_teacher = -(1 - alpha) * _kd_loss_hvp(upstream, grad, teacher, T, 0.0)
    return d_upstream, d_student, d_teacher, None, None, None


def _grad_jvp(inputs: Sequence[Any], *tangents: Tensor | None) -> Tensor:
    upstream, student, teacher, labels, T, alpha = inputs
    d_upstream, d_student, d_teacher, *_ = tangents
    along_upstream = along_student = along_teacher = None
    if d_upstream is not None:
        along_upstream = _kd_loss_grad(d_upstream, student, teacher, labels, T, alpha)
    if d_student is not None:
        along_student = _kd_loss_hvp(upstream, d_student, student, T, alpha)
    if d_teacher is not None:
        along_teacher = -(1 - alpha) * _kd_loss_hvp(upstream, d_teacher, teacher, T, 0.0)
    return _total(along_upstream, along_student, along_teacher)


def _hvp_backward(inputs: Sequence[Any], needs: Sequence[bool], grad: Tensor) -> Sequence[Tensor | None]:
    upstream, tangent, student, T, alpha = inputs
    d_upstream = d_tangent = d_student = None
    if needs[0]:
        d_upstream = _row_dot(_kd_loss_hvp(torch.ones_like(upstream), tangent, student, T, alpha), grad)
    if needs[1]:
        d_tangent = _kd_loss_hvp(upstream, grad, student, T, alpha)
    if needs[2]:
        d_student = reference.kd_loss_third(upstream, tangent, grad, student, T, alpha)
    return d_upstream, d_tangent, d_student, None, None


def _hvp_jvp(inputs: Sequence[Any], *tangents: Tensor | None) -> Tensor:
    upstream, tangent, student, T, alpha = inputs
    d_upstream, d_tangent, d_student, *_ = tangents
    along_upstream = along_tangent = along_student = None
    if d_upstream is not None:
        along_upstream = _kd_loss_hvp(d_upstream, tangent, student, T, alpha)
    if d_tangent is not None:
        along_tangent = _kd_loss_hvp(upstream, d_tangent, student, T, alpha)
    if d_student is not None:
        along_student = reference.kd_loss_third(upstream, tangent, d_student, student, T, alpha)
    return _total(along_upstream, along_tangent, along_student)


_ROWS = (True, True, True, True, False, False)
derive(_kd_loss, Rules(_loss_backward, _loss_jvp, _ROWS, with_grad=_kd_loss_with_grad))
derive(_kd_loss_grad, Rules(_grad_backward, _grad_jvp, _ROWS))
derive(_kd_loss_hvp, Rules(_hvp_backward, _hvp_jvp, (True, True, True, False, False)))


@functools.cache
def _try_rules() -> bool:
    """Try one jvp and one gradient against the reference: rules that a new torch ignores give zeros, not errors."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    student, teacher = torch.tensor([[0.5, -1.0]], **options), torch.tensor([[1.0, 0.25]], **options)
    labels, weight = torch.tensor([1], device="cpu"), torch.ones(1, **options)

    def derivatives(formula: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        def loss(s: Tensor) -> Tensor:
            return formula(s, teacher, labels, weight, 2.0, 0.5).sum()

        return _derive.directional_derivative(loss, student, teacher), torch.func.grad(loss)(student)

    expected = derivatives(reference.kd_loss)
    try:
        ours = derivatives(_kd_loss)
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


def _formula(*tensors: Tensor) -> Callable[..., Tensor]:
    """The op, or its decomposed form where this torch would ignore the op's derivative rules."""
    if not _derive.AVAILABLE or (_derive.is_transformed(*tensors) and not rules_work()):
        return reference.kd_loss
    return _kd_loss


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    reduction: str = "none",
    check_finite: bool = False,
) -> Tensor:
    """Weighted distillation loss, alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student), in nats.

    Fused: on the CPU one pass over the logits gives loss and gradient. Works under torch.func (grad, vjp, jvp, vmap,
    jacrev, jacfwd, hessian), double backward and torch.compile(fullgraph=True); the Hessian is in closed form.

    Args:
        student_logits: [..., V], float32, float64, bfloat16 or float16; V classes. -inf masks a class.
        teacher_logits: same shape and device; a different float dtype is converted to the wider of the two (a copy).
            Not read if alpha is 1. Differentiable too, through the reference formula.
        labels: int64 [...], the class of each row, 0 <= label < V.
        weight: [...], factor of each row's loss; may be negative, and is differentiable. Default 1.
        temperature: T > 0, divides both sets of logits in the KL part; its gradient is brought back to scale by T^2.
        alpha: weight of the cross-entropy part, in [0, 1].
        reduction: "none", "sum", or "mean" over rows (not divided by the sum of weights; 0 for no rows).
        check_finite: look for NaN and +inf in the logits first (reads them once more; waits for a GPU).

    Returns:
        [...] for "none", else a scalar; float32, or float64 for float64 logits. NaN logits give NaN in their row.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, labels out of range (on the CPU; a GPU gives NaN for that
            row), a temperature that is not positive, alpha outside [0, 1], an unknown reduction, logits that are not
            finite (if asked). Each names the argument and its value.

    Memory: the gradient [..., V], formed in the forward pass; a second one in the backward pass if the gradient that
        comes from above is not 1. Logits are read in place if a row's classes are contiguous, else copied.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2; per-row weights as in KD-AIF (arXiv 2501.02705).

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import kd_loss
        >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, -1.0, 0.0], [0.0, 2.0, 0.0]])
        >>> loss = kd_loss(student, teacher, torch.tensor([0, 1]), weight=torch.tensor([1.0, 0.5]), temperature=2.0)
        >>> print(loss.detach())
        tensor([0.2017, 0.2230])
        >>> loss.sum().backward()
    """
    _check_arguments(student_logits, teacher_logits, labels, weight, temperature, alpha, reduction)
    if student_logits.dtype != teacher_logits.dtype:
        dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
        student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.to(dtype)
    if check_finite:
        _check.is_finite_logits("kd_loss", "student_logits", student_logits)
        _check.is_finite_logits("kd_loss", "teacher_logits", teacher_logits)
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        # A teacher run in inference mode: autograd cannot keep such tensors, but copies of them.
        teacher_logits, labels = (x.clone() if x.is_inference() else x for x in (teacher_logits, labels))
        weight = weight.clone() if weight is not None and weight.is_inference() else weight
    shape, V = labels.shape, student_logits.shape[-1]
    if labels.dim() != 1:
        student_logits, teacher_logits = student_logits.reshape(-1, V), teacher_logits.reshape(-1, V)
        labels = labels.reshape(-1)
    dtype = reference.accumulation_dtype(student_logits)
    if weight is None:
        weight = torch.ones((), dtype=dtype, device=labels.device).expand(labels.shape)
    else:
        weight = weight.to(dtype).reshape(labels.shape)
    if reduction == "mean":
        weight = weight / max(labels.shape[0], 1)
    try:
        formula = _formula(student_logits, teacher_logits, weight)
        loss = formula(student_logits, teacher_logits, labels, weight, float(temperature), float(alpha))
    except RuntimeError:
        if not _derive.is_transformed(labels):
            _check.are_labels("kd_loss", "labels", labels, V)
        raise
    return loss.reshape(shape) if reduction == "none" else loss.sum()


def _check_arguments(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor | None, T: float, alpha: float, reduction: str
) -> None:
    _check.is_logits("kd_loss", "student_logits", student)
    _check.is_logits("kd_loss", "teacher_logits", teacher)
    _check.is_like("kd_loss", "teacher_logits", teacher, student.shape, "student_logits", student.device)
    _check.is_like("kd_loss", "labels", labels, student.shape[:-1], "student_logits without classes", student.device)
    if labels.dtype != torch.int64:
        raise TypeError(f"kd_loss: labels have dtype {labels.dtype}, expected torch.int64 class indices")
    if weight is not None:
        _check.is_like("kd_loss", "weight", weight, labels.shape, "labels", student.device)
        if not weight.is_floating_point():
            raise TypeError(f"kd_loss: weight has dtype {weight.dtype}, expected a floating-point dtype")
    _check.is_positive("kd_loss", "temperature", T)
    _check.is_share("kd_loss", "alpha", alpha)
    _check.is_choice("kd_loss", "reduction", reduction, REDUCTIONS)
