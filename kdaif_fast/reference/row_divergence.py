"""row_divergence by definition: the loss of a row, its gradient and its curvature product (docs/method.md, section 5).

N rows, V classes; the divergence is over C of them, from `first_class` on. A row's loss is

    weight * (ce * CE(a, softmax(s)) + kd * D(p, q) + other * R(p, q)),    q = softmax(s / T), p the teacher's target,

where D and R are what the kind says (row_terms.py). Low precision is widened to float32; so are losses.

All functions take the op's arguments, in this order:
    student [N, V]; teacher [N, C], or [N, k] for TOP_K; indices [N, k] int64, in [0, C), different within a row;
    second [N, C], a second teacher in the same form (not TOP_K); labels [N] int64; soft_labels [N, V];
    class_weight [V]; mask [N or 1, C] bool, True where a class takes part in the divergence; weight [N];
    rows [7, N], the settings of `Rows` row by row; numbers: the same for all rows (not looked at if rows is given),
    then label smoothing and skew; choices: `Choices`.
Each may be None where the loss does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .row_terms import (
    CROSS_ENTROPY,
    DECOUPLED,
    KL,
    LOG_COSH,
    LOGIT_MSE,
    LOGITS,
    TOP_K,
    Choices,
    Rows,
    accumulation_dtype,
    allowed_and_label,
    excess,
    log,
    row,
    settings,
    terms,
    times,
    wide,
)


def _choices(choices: Sequence[int], student: Tensor, teacher: Tensor | None) -> Choices:
    """With a class_count of -1 for as many classes as the teacher has (TOP_K: as the student has from there on)."""
    c = Choices(*choices)
    if c.class_count >= 0:
        return c
    if teacher is None or c.form == TOP_K:
        return c._replace(class_count=student.shape[1] - c.first_class)
    return c._replace(class_count=teacher.shape[1])


def _used(index: int, rows: Tensor | None, numbers: Sequence[float]) -> bool:
    return rows is not None or numbers[index] != 0


def _wants_ce(labels: Tensor | None, soft_labels: Tensor | None, rows: Tensor | None, numbers: Sequence[float]) -> bool:
    return (labels is not None or soft_labels is not None) and _used(1, rows, numbers)


def _without_ignored(x: Tensor | None, labels: Tensor | None, ignore_index: int) -> Any:
    """Zeros in the rows to be ignored: whatever they hold is to reach no derivative."""
    if x is None or labels is None:
        return x
    return x.masked_fill((labels == ignore_index)[:, None], 0)


def _label_target(student: Tensor, labels: Tensor | None, soft_labels: Tensor | None, class_weight: Tensor | None,
                  smoothing: float) -> Tensor:  # fmt: skip
    """The cross-entropy's target [N, V]: smoothed, and weighted by class. Its mass need not be 1."""
    V = student.shape[1]
    if soft_labels is not None:
        a = wide(soft_labels)
    else:
        assert labels is not None
        a = (labels[:, None] == torch.arange(V, device=student.device)).to(accumulation_dtype(student))
    a = (1 - smoothing) * a + smoothing / V
    return a if class_weight is None else class_weight * a


def _class_weight(class_weight: Tensor | None, c: Choices) -> Tensor | float:
    return 1.0 if class_weight is None else class_weight[..., c.first_class : c.first_class + c.class_count]


def _weighted(class_weight: Tensor | None, c: Choices, value: Tensor) -> Tensor:
    return (
        value
        if class_weight is None
        else times(class_weight[..., c.first_class : c.first_class + c.class_count], value)
    )


def _is_normalised(class_weight: Tensor | None, c: Choices) -> bool:
    is_softmax = c.form == LOGITS and not c.mixes
    return class_weight is None and (is_softmax or c.kind == DECOUPLED or bool(c.exclude_label))


def _chain(r: Rows, c: Choices) -> Tensor | float:
    """d(what log_q is made of) / d(student's logits)."""
    return 1.0 if c.kind == LOGIT_MSE else 1 / r.temperature


def _scaled(weight: Tensor | None, labels: Tensor | None, value: Tensor, ignore_index: int) -> Tensor:
    """weight * value row by row, 0 in the rows to be ignored. The rows are the first axis."""
    if weight is not None:
        value = weight.view(-1, *(1,) * (value.dim() - 1)) * value
    if labels is not None:
        value = value.masked_fill((labels == ignore_index).view(-1, *(1,) * (value.dim() - 1)), 0)
    return value


def _put_back(part: Tensor, V: int, c: Choices) -> Tensor:
    """[..., C] -> [..., V]."""
    return torch.nn.functional.pad(part, (c.first_class, V - c.first_class - c.class_count))


def row_divergence(
    student: Tensor,
    teacher: Tensor | None,
    indices: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    class_weight: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
) -> Tensor:
    """Loss of each row: [N]."""
    r, c = settings(student, rows, numbers), _choices(choices, student, teacher)
    student, teacher, second, soft_labels = (
        _without_ignored(x, labels, c.ignore_index) for x in (student, teacher, second, soft_labels)
    )
    loss = wide(student).new_zeros(student.shape[0])
    if _wants_ce(labels, soft_labels, rows, numbers):
        a = _label_target(student, labels, soft_labels, class_weight, numbers[7])
        log_q = wide(student).log_softmax(-1)
        loss = loss + times(r.ce[:, 0], -(a * log_q.masked_fill(a == 0, 0)).sum(-1))
    if teacher is not None and (_used(2, rows, numbers) or _used(3, rows, numbers)):
        constant = wide(student).detach()
        parts, label = row(student, constant, teacher, indices, second, labels, soft_labels, mask, r, c)
        value = terms(c.kind, parts, r.kd, r.other, numbers[8], _is_normalised(class_weight, c))[0]
        loss = loss + _weighted(class_weight, c, value).sum(-1)
        if label is not None:
            target_part = excess(label.p_y, log(label.p_y), label.log_q_y)
            target_part = target_part + excess(label.p_rest, log(label.p_rest), label.log_q_rest)
            loss = loss + times(r.kd, target_part)[:, 0]
    return _scaled(weight, labels, loss, c.ignore_index)


def row_divergence_grad(
    student: Tensor,
    teacher: Tensor | None,
    indices: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    class_weight: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
) -> Tensor:
    """Gradient of the sum of row_divergence with respect to the student's logits: [N, V]."""
    r, c = settings(student, rows, numbers), _choices(choices, student, teacher)
    student, teacher, second, soft_labels = (
        _without_ignored(x, labels, c.ignore_index) for x in (student, teacher, second, soft_labels)
    )
    V = student.shape[1]
    grad = torch.zeros_like(wide(student))
    if _wants_ce(labels, soft_labels, rows, numbers):
        a = _label_target(student, labels, soft_labels, class_weight, numbers[7])
        grad = grad + times(r.ce, a.sum(-1, keepdim=True) * wide(student).softmax(-1) - a)
    if teacher is not None and (_used(2, rows, numbers) or _used(3, rows, numbers)):
        constant = wide(student).detach()
        parts, label = row(student, constant, teacher, indices, second, labels, soft_labels, mask, r, c)
        first = terms(c.kind, parts, r.kd, r.other, numbers[8], False)[1] * _class_weight(class_weight, c)
        part = first - parts.q * first.sum(-1, keepdim=True)
        if label is not None:
            mass, q_y, q_rest = label.p_y + label.p_rest, label.log_q_y.exp(), label.log_q_rest.exp()
            _, is_label = allowed_and_label(student, labels, mask, c)
            part = part + r.kd * parts.q * (mass * q_rest - label.p_rest)
            part = part + r.kd * is_label * (mass * q_y - label.p_y)
        grad = grad + _put_back(part * _chain(r, c), V, c)
    return _scaled(weight, labels, grad, c.ignore_index).to(student.dtype)


def row_divergence_with_grad(*args: Any) -> tuple[Tensor, Tensor]:
    """row_divergence [N] together with its gradient with respect to the student's logits [N, V], row by row."""
    return row_divergence(*args), row_divergence_grad(*args)


def row_divergence_hvp(
    tangents: Tensor,
    gauss_newton: bool,
    student: Tensor,
    teacher: Tensor | None,
    indices: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    class_weight: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
) -> Tensor:
    """Hessian of each row's loss in the student's logits times K tangents: [K, N, V] -> [K, N, V].

    gauss_newton: for the divergences that are convex in q rather than in log q, the Hessian without the part that
    comes from the curvature of the softmax itself; never negative for weights that are not. The same for the others.
    """
    r, c = settings(student, rows, numbers), _choices(choices, student, teacher)
    student, teacher, second, soft_labels = (
        _without_ignored(x, labels, c.ignore_index) for x in (student, teacher, second, soft_labels)
    )
    V, u = student.shape[1], wide(tangents).transpose(0, 1)
    hvp = torch.zeros_like(u)

    def curve(q: Tensor, v: Tensor) -> Tensor:  # (diag(q) - q q^T) v, and what is like it
        return q * (v - (q * v).sum(-1, keepdim=True))

    if _wants_ce(labels, soft_labels, rows, numbers):
        a = _label_target(student, labels, soft_labels, class_weight, numbers[7])
        hvp = hvp + times((r.ce * a.sum(-1, keepdim=True))[:, None], curve(wide(student).softmax(-1)[:, None], u))
    if teacher is not None and (_used(2, rows, numbers) or _used(3, rows, numbers)):
        constant = wide(student).detach()
        parts, label = row(student, constant, teacher, indices, second, labels, soft_labels, mask, r, c)
        kappa = _class_weight(class_weight, c)
        _, first, curvature = (x * kappa for x in terms(c.kind, parts, r.kd, r.other, numbers[8], False))
        v, q = u[..., c.first_class : c.first_class + c.class_count], parts.q[:, None]
        mass = first.sum(-1, keepdim=True)[:, None]  # of the terms whose softmax curvature counts
        if gauss_newton and c.kind not in (CROSS_ENTROPY, DECOUPLED):
            forward = r.kd * parts.p * kappa if c.kind == KL else torch.zeros_like(parts.p)
            if c.kind not in (LOGIT_MSE, LOG_COSH):
                curvature = curvature - first - forward
            mass = -forward.sum(-1, keepdim=True)[:, None]
        centred = v - (q * v).sum(-1, keepdim=True)
        along = curvature[:, None] * centred
        part = along - q * along.sum(-1, keepdim=True) - mass * q * centred
        if label is not None:
            _, is_label = allowed_and_label(student, labels, mask, c)
            q_y, q_rest = label.log_q_y.exp()[:, None], label.log_q_rest.exp()[:, None]
            all_q = q_rest * q + q_y * is_label[:, None]
            target_part = (label.p_y + label.p_rest)[:, None] * curve(all_q, v) - label.p_rest[:, None] * q * centred
            part = part + r.kd[:, None] * target_part
        chain = _chain(r, c)
        chain = chain if isinstance(chain, float) else chain[:, None]
        hvp = hvp + _put_back(part * chain * chain, V, c)
    return _scaled(weight, labels, hvp, c.ignore_index).to(student.dtype).transpose(0, 1)
