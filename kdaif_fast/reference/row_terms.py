"""What row_divergence is made of: kinds, settings, the target, and the terms of each divergence.

Every divergence of softmax outputs is a sum over classes of a function of log q (`terms`), so that one chain rule
serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KL = 0  # D: sum p log(p / q), forward; R: sum q log(q / p), reverse
CROSS_ENTROPY = 1  # D: -sum p log q
JENSEN_SHANNON = 2  # D: skew sum p log(p / m) + (1 - skew) sum q log(q / m), m = skew p + (1 - skew) q
SKEW_FORWARD = 3  # D: sum p log(p / m), m = skew p + (1 - skew) q
SKEW_REVERSE = 4  # D: sum q log(q / m), m = skew q + (1 - skew) p
TOTAL_VARIATION = 5  # D: sum |q - p| / 2
PROBABILITY_MSE = 6  # D: sum (q - p)^2 / C
LOGIT_MSE = 7  # D: sum (s - t)^2 / C, whatever T is
LOG_COSH = 8  # D: sum log cosh((s - t) / (2 T))
DECOUPLED = 9  # D: KL between (p_y, 1 - p_y) and (q_y, 1 - q_y); R: forward KL between what is left without the label
SWAPPED_CROSS_ENTROPY = 10  # D: -sum q log p; what CROSS_ENTROPY is to the teacher
KINDS = range(11)

LOGITS, PROBABILITIES, TOP_K = range(3)  # forms of the teacher


class Rows(NamedTuple):
    """Per-row settings, each a column [N, 1] or one number for all rows [1, 1]."""

    temperature: Tensor
    ce: Tensor  # weight of the cross-entropy
    kd: Tensor  # weight of D
    other: Tensor  # weight of R
    label_mix: Tensor  # share of the label in the target
    interpolation: Tensor  # share of the teacher in the logits that make the target; the rest is the student's own
    gate: Tensor  # share of the second teacher in the target


class Choices(NamedTuple):
    """What is the same for all rows."""

    kind: int
    form: int
    mixes: int  # the target is a mixture: of two teachers, or with the label
    exclude_label: int  # the divergence is between the distributions conditional on not being the label
    first_class: int
    class_count: int
    ignore_index: int  # rows with this label have no loss


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that sums, losses and row weights have for logits of this dtype."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in its accumulation dtype."""
    return x.to(accumulation_dtype(x))


def settings(student: Tensor, rows: Tensor | None, numbers: Sequence[float]) -> Rows:
    """The seven per-row settings: from `rows` [7, N] if it is there, else from `numbers`."""
    if rows is None:
        dtype = accumulation_dtype(student)
        return Rows(*(torch.full((1, 1), float(x), dtype=dtype, device=student.device) for x in numbers[:7]))
    return Rows(*rows[:, :, None].unbind())


def log(p: Tensor) -> Tensor:
    """The logarithm; where p is 0, -inf without a NaN in its derivatives."""
    return torch.where(p > 0, p, 1).log().masked_fill(p == 0, -math.inf)


def _log_softmax(x: Tensor, allowed: Tensor) -> Tensor:
    """Over the allowed classes; -inf elsewhere, and everywhere in rows that allow none."""
    nothing = ~allowed.any(-1, keepdim=True)
    x = x.masked_fill(~allowed & ~nothing, -math.inf)
    return x.log_softmax(-1).masked_fill(~allowed, -math.inf)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where weight is 0: a part without weight is not looked at, whatever its infinities."""
    return torch.where(weight == 0, 0, weight * value)


class Row(NamedTuple):
    """What the terms of a divergence are made of; [N, C] each."""

    q: Tensor
    log_q: Tensor
    p: Tensor
    log_p: Tensor
    allowed: Tensor


class Label(NamedTuple):
    """The label's own part in the DECOUPLED divergence; [N, 1] each, p_y + p_rest need not be 1."""

    p_y: Tensor
    p_rest: Tensor
    log_q_y: Tensor
    log_q_rest: Tensor


def allowed_and_label(student: Tensor, labels: Tensor | None, mask: Tensor | None, c: Choices) -> tuple[Tensor, Tensor]:
    """Which classes take part in the divergence, and which is the label: [N, C] bool each."""
    shape = (student.shape[0], c.class_count)
    allowed = torch.ones(shape, dtype=torch.bool, device=student.device)
    if mask is not None:
        allowed = allowed & mask
    if labels is None:
        return allowed, torch.zeros_like(allowed)
    return allowed, labels[:, None] - c.first_class == torch.arange(c.class_count, device=student.device)


def _given(values: Tensor, indices: Tensor | None, allowed: Tensor) -> Tensor:
    values = wide(values)
    if indices is not None:
        N, C = allowed.shape
        rest = (1 - values.sum(-1, keepdim=True)).clamp(min=0) / max(C - indices.shape[1], 1)
        values = rest.expand(N, C).scatter(-1, indices, values)
    return values.masked_fill(~allowed, 0)


def _interpolated(student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
    t, s = wide(teacher), wide(student)
    return torch.where(share == 1, t, torch.where(share == 0, s, share * t + (1 - share) * s))


def _mixture(
    constant: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    second: Tensor | None,
    soft_labels: Tensor | None,
    is_label: Tensor,
    allowed: Tensor,
    r: Rows,
    c: Choices,
) -> Tensor:
    """The target's probabilities where they are no plain softmax: [N, C]."""
    if c.form == LOGITS:
        p = _log_softmax(_interpolated(constant, teacher, r.interpolation) / r.temperature, allowed).exp()
    else:
        p = _given(teacher, indices, allowed)
    if second is not None:
        is_logits = c.form == LOGITS
        q = _log_softmax(wide(second) / r.temperature, allowed).exp() if is_logits else _given(second, None, allowed)
        p = (1 - r.gate) * p + r.gate * q
    if soft_labels is None:
        label = (is_label & allowed).to(p.dtype)
    else:
        label = wide(soft_labels)[:, c.first_class : c.first_class + c.class_count].masked_fill(~allowed, 0)
    return (1 - r.label_mix) * p + r.label_mix * label if c.mixes else p


def row(
    student: Tensor,
    constant: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    mask: Tensor | None,
    r: Rows,
    c: Choices,
) -> tuple[Row, Label | None]:
    """q and p over the classes of the divergence. `constant` is the student where it makes the target."""
    inside = slice(c.first_class, c.first_class + c.class_count)
    s, constant = wide(student)[:, inside], constant[:, inside]
    allowed, is_label = allowed_and_label(student, labels, mask, c)
    if c.kind in (LOGIT_MSE, LOG_COSH):
        T = r.temperature if c.kind == LOG_COSH else 1.0
        t = _interpolated(constant, teacher, r.interpolation) / T
        s = s / T
        if c.exclude_label:
            allowed = allowed & ~is_label
        return Row(torch.zeros_like(s), s, torch.zeros_like(s), t.expand_as(s), allowed), None
    without = allowed & ~is_label if c.exclude_label or c.kind == DECOUPLED else allowed
    log_q = _log_softmax(s / r.temperature, without)
    label = None
    if c.form == LOGITS and not c.mixes:
        t = _interpolated(constant, teacher, r.interpolation) / r.temperature
        log_p = _log_softmax(t, without)
        p, full = log_p.exp(), _log_softmax(t, allowed).exp()
    else:
        full = _mixture(constant, teacher, indices, second, soft_labels, is_label, allowed, r, c)
        p = full
        if without is not allowed:
            p = full.masked_fill(~without, 0)
            rest = p.sum(-1, keepdim=True)
            p = p / torch.where(rest > 0, rest, 1)
        log_p = log(p)
    if c.kind == DECOUPLED:
        all_log_q = _log_softmax(s / r.temperature, allowed)

        def total(x: Tensor, where: Tensor) -> Tensor:
            return x.masked_fill(~where, 0).sum(-1, keepdim=True)

        def log_total(x: Tensor, where: Tensor) -> Tensor:
            return x.masked_fill(~where, -math.inf).logsumexp(-1, keepdim=True)

        here = is_label & allowed
        label = Label(
            total(full, here), total(full, without), log_total(all_log_q, here), log_total(all_log_q, without)
        )
    return Row(log_q.exp(), log_q, p, log_p, without), label


def excess(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b), 0 where a is 0."""
    return a * (log_a - log_b).masked_fill(a == 0, 0)


def _log_of_mixture(m: Tensor) -> Tensor:
    """log(m), finite where m underflows though what it is mixed from does not."""
    return m.clamp(min=torch.finfo(m.dtype).tiny).log()


def _divergence(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor, normalised: bool) -> Tensor:
    """Terms that sum to KL(a || b). Of normalised ones a log(a / b) + b - a, since none of these is negative."""
    value = excess(a, log_a, log_b)
    if not normalised:
        return value
    value = value + b - a
    # Rounding can put a term below zero all the same; lifting it must not take its gradient away.
    return value + (value.clamp(min=0) - value).detach().nan_to_num()


def terms(
    kind: int, row: Row, kd: Tensor, other: Tensor, skew: float, normalised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value of each class's term, and its first and second derivative with respect to log q: [N, C] each.

    For the kinds between logits (LOGIT_MSE, LOG_COSH) log_q and log_p hold the logits (of LOG_COSH: divided by T), and
    the derivatives are with respect to them.
    """
    q, log_q, p, log_p, _ = row
    zero = torch.zeros_like(q)
    if kind in (KL, DECOUPLED):
        forward = kd if kind == KL else other
        value, first, second = times(forward, _divergence(p, log_p, q, log_q, normalised)), -forward * p, zero
        if kind == KL:
            reverse = excess(q, log_q, log_p)
            value = value + times(other, _divergence(q, log_q, p, log_p, normalised))
            first = first + times(other, reverse + q)
            second = second + times(other, reverse + 2 * q)
        return value, first, second
    if kind == CROSS_ENTROPY:
        return times(kd, -p * log_q.masked_fill(p == 0, 0)), -kd * p, zero
    if kind == SWAPPED_CROSS_ENTROPY:
        cross = times(kd, -q * log_p.masked_fill(q == 0, 0))
        return cross, cross, cross
    if kind == JENSEN_SHANNON:
        m = skew * p + (1 - skew) * q
        log_m = _log_of_mixture(m)
        share = p / torch.where(m > 0, m, 1)
        first = (1 - skew) * excess(q, log_q, log_m)
        value = skew * excess(p, log_p, log_m) + first
        return kd * value, kd * first, kd * (first + (1 - skew) * skew * q * share)
    if kind == SKEW_FORWARD:
        m = skew * p + (1 - skew) * q
        share = p / torch.where(m > 0, m, 1)
        first = -(1 - skew) * q * share
        return times(kd, excess(p, log_p, _log_of_mixture(m))), kd * first, kd * first * skew * share
    if kind == SKEW_REVERSE:
        m = skew * q + (1 - skew) * p
        share = (1 - skew) * p / torch.where(m > 0, m, 1)
        value = excess(q, log_q, _log_of_mixture(m))
        first = value + q * share
        return times(kd, value), times(kd, first), times(kd, first + q * share**2)
    if kind == TOTAL_VARIATION:
        first = (q - p).sign() * q / 2
        return kd * (q - p).abs() / 2, kd * first, kd * first
    count = row.allowed.sum(-1, keepdim=True).clamp(min=1)
    if kind == PROBABILITY_MSE:
        first = 2 * (q - p) * q / count
        return kd * (q - p) ** 2 / count, kd * first, kd * (first + 2 * q**2 / count)
    nowhere = ~row.allowed | ((log_q == log_p) & log_q.isinf())
    difference = (log_q - log_p).masked_fill(nowhere, 0)
    if kind == LOGIT_MSE:
        curvature = (kd * 2 / count).expand_as(q)
        return kd * difference**2 / count, kd * 2 * difference / count, curvature.masked_fill(nowhere, 0)
    half = difference / 2
    log_cosh = half.abs() + torch.log1p(torch.exp(-2 * half.abs())) - math.log(2)
    curvature = (kd * (1 - half.tanh() ** 2) / 4).masked_fill(nowhere, 0)
    return kd * log_cosh, kd * half.tanh() / 2, curvature
