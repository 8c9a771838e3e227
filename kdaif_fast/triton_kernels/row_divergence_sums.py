"""The first pass of row_divergence's Triton kernels over a row: maxima and sums, and what follows from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_divergence_rows import (
    allowed_classes,
    block_of,
    given_probabilities,
    interpolated,
    label_target,
    only_kept,
    read_student,
    second_logits,
    target_logits,
    two_teachers,
    without_label,
)
from .row_divergence_terms import INFINITY, LOGITS, excess, log1p, log_of, log_sigmoid


class Sums(NamedTuple):
    """Maxima and sums of a row. Sums of logits are of exponentials relative to the maximum, over the classes of q."""

    max_1: Any  # student at temperature 1, all classes
    sum_1: Any
    max_s: Any  # student
    sum_s: Any
    max_t: Any  # target, or where it is given, the sum of its probabilities
    sum_t: Any
    max_2: Any  # second teacher, likewise
    sum_2: Any
    soft: Any  # soft labels
    count: Any  # how many classes take part
    label_mass: Any  # the cross-entropy's target


class Statistics(NamedTuple):
    """What later passes need of a row: maxima, and sums of exponentials relative to them as 1 / sum and as logarithm.

    A probability is exp(x - max) / sum, not exp of its logarithm: in rows of one block the first pass has formed that.
    """

    max_1: Any  # student at temperature 1, all classes
    inverse_1: Any
    log_1: Any
    max_s: Any  # student over the classes of q
    inverse_s: Any
    log_s: Any
    max_t: Any  # target, likewise
    inverse_t: Any
    log_t: Any
    log_t_all: Any  # with the label again
    max_2: Any
    log_2_all: Any  # second teacher with the label again
    scale: Any  # makes the target sum to 1 over the classes of q
    mass: Any  # the sum of the target over the classes of q, where it is known
    inverse_count: Any
    label_mass: Any


class LabelPart(NamedTuple):
    """The label's own part in the DECOUPLED divergence; names as in the reference."""

    p_y: Any
    p_rest: Any
    log_p_y: Any
    log_p_rest: Any
    log_q_y: Any
    log_q_rest: Any


class AtLabel(NamedTuple):
    """The label's logits as they stand in the sums, (x - max) / T; -inf where it is not among the classes."""

    s: Any
    t: Any
    second: Any


@triton.jit
def _merge(maximum, total, values, inverse):
    """A block's part in a running maximum and sum of exponentials; a maximum of -inf is not subtracted from itself."""
    above = tl.maximum(maximum, tl.max(values, 0))
    shift = _finite_or_zero(above)
    kept = total * tl.exp((maximum - shift) * inverse)
    return above, kept + tl.sum(tl.exp((values - shift) * inverse), 0)


@triton.jit
def _finite_or_zero(maximum):
    return tl.where(maximum == -INFINITY, 0.0, maximum)


@triton.jit
def _read_sums(x, steps, w, reads_target: tl.constexpr, o: tl.constexpr, BLOCK: tl.constexpr):
    """The first pass: all maxima and sums in one reading of the row."""
    zero = tl.full((), 0.0, tl.float32)
    lowest = tl.full((), -INFINITY, tl.float32)
    max_1, max_s, max_t, max_2 = lowest, lowest, lowest, lowest
    sum_1, sum_s, sum_t, sum_2 = zero, zero, zero, zero
    soft, count, label_mass = zero, zero, zero
    for step in range(0, steps):
        at = block_of(step, steps, BLOCK, False)
        s = read_student(x, at)
        if o.ce:
            max_1, sum_1 = _merge(max_1, sum_1, s, 1.0)
        if o.spreads_label:
            label_mass += tl.sum(label_target(x, at, w, o), 0)
        if o.divergence:
            kept = without_label(x, at, allowed_classes(x, at, o), o)
        if o.counts:
            count += tl.sum(tl.where(kept, 1.0, 0.0), 0)
        if o.between_softmaxes:
            max_s, sum_s = _merge(max_s, sum_s, only_kept(kept, s, o), w.inverse)
            if reads_target and o.form == LOGITS:
                t = target_logits(x, at, s, w, o)
                max_t, sum_t = _merge(max_t, sum_t, only_kept(kept, t, o), w.inverse)
                if o.second:
                    t = second_logits(x, at, o)
                    max_2, sum_2 = _merge(max_2, sum_2, only_kept(kept, t, o), w.inverse)
            if o.sums_given:
                sum_t += tl.sum(tl.where(kept, given_probabilities(x, at, o), 0.0), 0)
                if o.second:
                    sum_2 += tl.sum(tl.load(x.second + at, mask=kept, other=0.0).to(tl.float32), 0)
            if o.mixes and o.soft and o.leaves_out:
                soft += tl.sum(tl.load(x.soft + at, mask=kept, other=0.0).to(tl.float32), 0)
    max_1, max_s, max_t, max_2 = (
        _finite_or_zero(max_1), _finite_or_zero(max_s), _finite_or_zero(max_t), _finite_or_zero(max_2)
    )  # fmt: skip
    return Sums(max_1, sum_1, max_s, sum_s, max_t, sum_t, max_2, sum_2, soft, count, label_mass)


@triton.jit
def _read_label(pointer, x, other):
    return tl.load(pointer + x.label, mask=x.label_counts, other=other).to(tl.float32)


@triton.jit
def _label_logits(x, sums, w, o: tl.constexpr):
    s = _read_label(x.student, x, -INFINITY)
    t = s
    second = s
    if o.form == LOGITS:
        t = interpolated(_read_label(x.teacher, x, -INFINITY), s, w, o)
        if o.second:
            second = _read_label(x.second, x, -INFINITY)
    return AtLabel(
        (s - sums.max_s) * w.inverse, (t - sums.max_t) * w.inverse, (second - sums.max_2) * w.inverse
    )  # fmt: skip


@triton.jit
def _with_label(log_sum, label):
    """log(exp(log_sum) + exp(label)); both may be -inf."""
    above = tl.maximum(log_sum, label)
    return tl.where(above == -INFINITY, -INFINITY, above + log1p(tl.exp(-tl.abs(log_sum - label))))


@triton.jit
def _masses(x, sums, y, w, o: tl.constexpr):
    """The target's mass at the label and without it, where it is no plain softmax."""
    if o.form == LOGITS:
        log_t = tl.log(sums.sum_t)
        p_y = tl.exp(log_sigmoid(y.t, log_t))
        p_rest = tl.exp(log_sigmoid(log_t, y.t))
    else:
        somewhere = tl.where(x.label_counts, x.label, x.first_class)
        p_y = tl.sum(given_probabilities(x, somewhere + tl.zeros((1,), tl.int32), o), 0)
        p_y = tl.where(x.label_counts, p_y, 0.0)
        p_rest = sums.sum_t
    if o.second:
        if o.form == LOGITS:
            log_2 = tl.log(sums.sum_2)
            p_y = two_teachers(p_y, tl.exp(log_sigmoid(y.second, log_2)), w.gate)
            p_rest = two_teachers(p_rest, tl.exp(log_sigmoid(log_2, y.second)), w.gate)
        else:
            p_y = two_teachers(p_y, _read_label(x.second, x, 0.0), w.gate)
            p_rest = two_teachers(p_rest, sums.sum_2, w.gate)
    if o.mixes:
        label_y = _read_label(x.soft, x, 0.0) if o.soft else tl.where(x.label_counts, 1.0, 0.0)
        p_y = (1.0 - w.label_mix) * p_y + w.label_mix * label_y
        p_rest = (1.0 - w.label_mix) * p_rest + w.label_mix * sums.soft
    return p_y, p_rest


@triton.jit
def _label_part(sums, y, p_y, p_rest, o: tl.constexpr):
    log_s = tl.log(sums.sum_s)
    log_q_y, log_q_rest = log_sigmoid(y.s, log_s), log_sigmoid(log_s, y.s)
    if o.plain:
        log_t = tl.log(sums.sum_t)
        log_p_y, log_p_rest = log_sigmoid(y.t, log_t), log_sigmoid(log_t, y.t)
        return LabelPart(tl.exp(log_p_y), tl.exp(log_p_rest), log_p_y, log_p_rest, log_q_y, log_q_rest)
    else:
        return LabelPart(p_y, p_rest, log_of(p_y), log_of(p_rest), log_q_y, log_q_rest)


@triton.jit
def statistics_of(x, steps, w, reads_target: tl.constexpr, o: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics and LabelPart of a row."""
    sums = _read_sums(x, steps, w, reads_target, o, BLOCK)
    label_mass = sums.label_mass
    if o.ce and not o.spreads_label:
        label_mass = 1.0
        if o.class_weight:
            label_mass = tl.load(x.class_weight + x.label, mask=x.label >= 0, other=0.0).to(tl.float32)
    log_t, log_2 = tl.log(sums.sum_t), tl.log(sums.sum_2)
    log_t_all, log_2_all = log_t, log_2
    scale, mass = 1.0, 1.0
    if o.sums_given:
        mass = sums.sum_t
    part = LabelPart(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if o.leaves_out and o.between_softmaxes:
        y = _label_logits(x, sums, w, o)
        p_y, p_rest = 0.0, 0.0
        if not o.plain:
            p_y, p_rest = _masses(x, sums, y, w, o)
            scale = 1.0 / tl.where(p_rest > 0, p_rest, 1.0)
            mass = excess(p_rest, scale)
            log_t_all, log_2_all = _with_label(log_t, y.t), _with_label(log_2, y.second)
        part = _label_part(sums, y, p_y, p_rest, o)
    found = Statistics(
        sums.max_1, 1.0 / sums.sum_1, tl.log(sums.sum_1), sums.max_s, 1.0 / sums.sum_s, tl.log(sums.sum_s),
        sums.max_t, 1.0 / sums.sum_t, log_t, log_t_all, sums.max_2, log_2_all,
        scale, mass, 1.0 / tl.maximum(sums.count, 1.0), label_mass,
    )  # fmt: skip
    return found, part
