"""How row_divergence's Triton kernels read a row: its settings, its first pass, and what one block of it holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_divergence_terms import (
    INFINITY,
    LOG_COSH,
    LOGITS,
    TOP_K,
    Settings,
    excess,
    log1p,
    log_of,
    log_sigmoid,
    logit_term,
    softmax_term,
)


class Row(NamedTuple):
    """Where a row lies and how long it is. Pointers take positions in the student's row, where `first_class` is the teacher's first."""

    student: Any
    teacher: Any
    indices: Any
    second: Any
    soft: Any
    class_weight: Any
    mask: Any
    V: Any
    C: Any
    end: Any  # V, or 0 in rows that are ignored: masks off every read
    first_class: Any
    top_k: Any
    rest_share: Any  # of top-k targets: the probability of each other class
    label: Any  # -1 if it is no class
    label_counts: Any  # the label is among the divergence's classes


class Statistics(NamedTuple):
    """What the first pass finds: maxima, and sums of exponentials relative to them, as 1 / sum and as log(sum).

    A probability is exp(x - max) / sum, not exp of its logarithm: in rows of one block the first pass has formed that.
    """

    max_1: Any  # student at temperature 1, all classes
    inverse_1: Any
    log_1: Any
    max_s: Any  # student over the classes of q
    inverse_s: Any
    log_s: Any
    max_t: Any  # teacher, likewise
    inverse_t: Any
    log_t: Any
    log_t_all: Any  # with the label again
    max_2: Any  # second teacher, with the label again
    log_2_all: Any
    scale: Any  # makes the target sum to 1 over the classes of q
    mass: Any  # the sum of the target over the classes of q, where that is known
    inverse_count: Any
    label_mass: Any  # the sum of the cross-entropy's target


class LabelPart(NamedTuple):
    """The label's own part in the DECOUPLED divergence; names as in the reference."""

    p_y: Any
    p_rest: Any
    log_p_y: Any
    log_p_rest: Any
    log_q_y: Any
    log_q_rest: Any


class Block(NamedTuple):
    """A block of classes: the student's logits, q and the terms of the divergence."""

    s: Any
    q: Any
    term: Any


@triton.jit
def read_settings(
    rows, row, N, temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew, per_row: tl.constexpr
):
    """The settings of a row: from `rows` [7, N], or the numbers."""
    if per_row:
        at = rows + row
        step = tl.cast(N, tl.int64)
        return Settings(
            1.0 / tl.load(at),
            tl.load(at + step),
            tl.load(at + 2 * step),
            tl.load(at + 3 * step),
            tl.load(at + 4 * step),
            tl.load(at + 5 * step),
            tl.load(at + 6 * step),
            smoothing,
            skew,
        )
    else:
        return Settings(1.0 / temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew)


@triton.jit
def rest_of_top_k(values, count, C, WIDTH: tl.constexpr):
    """The probability that each class outside of a top-k target has."""
    at = tl.arange(0, WIDTH)
    rest = 1.0 - tl.sum(tl.load(values + at, mask=at < count, other=0.0).to(tl.float32), 0)
    return tl.where(rest < 0, 0.0, rest) / tl.maximum(C - count, 1).to(tl.float32)


@triton.jit
def block_of(step, steps, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """The positions of a block. Every pass begins where the one before it ended: the caches still hold that."""
    if BACKWARD:
        return (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
    else:
        return step * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def read_student(x, at):
    return tl.load(x.student + at, mask=at < x.end, other=-INFINITY).to(tl.float32)


@triton.jit
def inside_divergence(x, at, o: tl.constexpr):
    inside = at < x.end
    if o.sliced:
        j = at - x.first_class
        inside = inside & (j >= 0) & (j < x.C)
    return inside


@triton.jit
def allowed_classes(x, at, o: tl.constexpr):
    """Which classes of a block take part in the divergence; the label does."""
    allowed = inside_divergence(x, at, o)
    if o.mask:
        allowed = allowed & (tl.load(x.mask + at, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def without_label(x, at, allowed, o: tl.constexpr):
    """The classes of q."""
    return allowed & (at != x.label) if o.leaves_out else allowed


@triton.jit
def _only(kept, values, o: tl.constexpr):
    """-inf in place of logits that do not count; those beyond the row are -inf already."""
    return tl.where(kept, values, -INFINITY) if o.mask or o.sliced or o.leaves_out else values


@triton.jit
def _target_logits(x, at, s, w, o: tl.constexpr):
    t = tl.load(x.teacher + at, mask=inside_divergence(x, at, o), other=-INFINITY).to(tl.float32)
    if o.interpolates:
        share = w.interpolation
        t = tl.where(share == 1, t, tl.where(share == 0, s, share * t + (1.0 - share) * s))
    return t


@triton.jit
def _second_logits(x, at, o: tl.constexpr):
    return tl.load(x.second + at, mask=inside_divergence(x, at, o), other=-INFINITY).to(tl.float32)


@triton.jit
def _given(x, at, o: tl.constexpr):
    """The teacher's probabilities as they were given."""
    if o.form == TOP_K:
        p = tl.zeros_like(at).to(tl.float32) + x.rest_share
        for i in range(0, x.top_k):
            value = tl.load(x.teacher + i).to(tl.float32)
            p = tl.where(at - x.first_class == tl.load(x.indices + i), value, p)
        return p
    else:
        return tl.load(x.teacher + at, mask=inside_divergence(x, at, o), other=0.0).to(tl.float32)


@triton.jit
def _teachers(first, second, gate):
    return (1.0 - gate) * first + gate * second


@triton.jit
def _mixed(x, at, s, allowed, statistics, w, o: tl.constexpr):
    """A target that is no plain softmax, with the label and not scaled."""
    if o.form == LOGITS:
        t = tl.where(allowed, _target_logits(x, at, s, w, o), -INFINITY)
        p = tl.exp((t - statistics.max_t) * w.inverse - statistics.log_t_all)
    else:
        p = _given(x, at, o)
    if o.second:
        if o.form == LOGITS:
            t = tl.where(allowed, _second_logits(x, at, o), -INFINITY)
            p = _teachers(p, tl.exp((t - statistics.max_2) * w.inverse - statistics.log_2_all), w.gate)
        else:
            second = tl.load(x.second + at, mask=inside_divergence(x, at, o), other=0.0).to(tl.float32)
            p = _teachers(p, second, w.gate)
    if o.mixes:
        if o.soft:
            label = tl.load(x.soft + at, mask=allowed, other=0.0).to(tl.float32)
        else:
            label = tl.where(at == x.label, 1.0, 0.0)
        p = (1.0 - w.label_mix) * p + w.label_mix * label
    return tl.where(allowed, p, 0.0)


@triton.jit
def softmax_1(s, found):
    """The student's softmax at temperature 1."""
    return tl.exp(s - found.max_1) * found.inverse_1


@triton.jit
def label_target(x, at, w, o: tl.constexpr):
    """The cross-entropy's target in a block."""
    if o.soft:
        a = tl.load(x.soft + at, mask=at < x.end, other=0.0).to(tl.float32)
    else:
        a = tl.where(at == x.label, 1.0, 0.0)
    if o.smooths:
        a = tl.where(at < x.end, (1.0 - w.smoothing) * a + w.smoothing / x.V, 0.0)
    if o.class_weight:
        a = a * tl.load(x.class_weight + at, mask=at < x.end, other=0.0).to(tl.float32)
    return a


@triton.jit
def _merge(maximum, total, values, inverse):
    """A block's part in a running maximum and sum of exponentials; a maximum of -inf is not subtracted from itself."""
    above = tl.maximum(maximum, tl.max(values, 0))
    shift = tl.where(above == -INFINITY, 0.0, above)
    kept = total * tl.exp((maximum - shift) * inverse)
    return above, kept + tl.sum(tl.exp((values - shift) * inverse), 0)


@triton.jit
def _finite_or_zero(maximum):
    return tl.where(maximum == -INFINITY, 0.0, maximum)


@triton.jit
def _read_label(pointer, x, other):
    return tl.load(pointer + x.label, mask=x.label_counts, other=other).to(tl.float32)


@triton.jit
def _label_logits(x, w, o: tl.constexpr):
    """The label's logits, -inf where it is not among the divergence's classes: student, target, second teacher."""
    s = _read_label(x.student, x, -INFINITY)
    t = s
    second = s
    if o.form == LOGITS:
        t = _read_label(x.teacher, x, -INFINITY)
        if o.interpolates:
            share = w.interpolation
            t = tl.where(share == 1, t, tl.where(share == 0, s, share * t + (1.0 - share) * s))
        if o.second:
            second = _read_label(x.second, x, -INFINITY)
    return s, t, second


@triton.jit
def _with_label(log_sum, label):
    """log(exp(log_sum) + exp(label)); both may be -inf."""
    above = tl.maximum(log_sum, label)
    return tl.where(above == -INFINITY, -INFINITY, above + log1p(tl.exp(-tl.abs(log_sum - label))))


@triton.jit
def _masses(x, statistics, t_label, second_label, rest, second_rest, soft_rest, w, o: tl.constexpr):
    """The target's mass at the label and without it, where it is no plain softmax."""
    if o.form == LOGITS:
        at_label = (t_label - statistics.max_t) * w.inverse
        p_y = tl.exp(log_sigmoid(at_label, statistics.log_t))
        p_rest = tl.exp(log_sigmoid(statistics.log_t, at_label))
    else:
        somewhere = tl.where(x.label_counts, x.label, x.first_class)
        p_y = tl.sum(_given(x, somewhere + tl.zeros((1,), tl.int32), o), 0)
        p_y = tl.where(x.label_counts, p_y, 0.0)
        p_rest = rest
    if o.second:
        if o.form == LOGITS:
            at_label = (second_label - statistics.max_2) * w.inverse
            second_y = tl.exp(log_sigmoid(at_label, second_rest))
            second_rest = tl.exp(log_sigmoid(second_rest, at_label))
        else:
            second_y = _read_label(x.second, x, 0.0)
        p_y = _teachers(p_y, second_y, w.gate)
        p_rest = _teachers(p_rest, second_rest, w.gate)
    if o.mixes:
        label_y = _read_label(x.soft, x, 0.0) if o.soft else tl.where(x.label_counts, 1.0, 0.0)
        p_y = (1.0 - w.label_mix) * p_y + w.label_mix * label_y
        p_rest = (1.0 - w.label_mix) * p_rest + w.label_mix * soft_rest
    return p_y, p_rest


@triton.jit
def _label_part(statistics, s_label, t_label, p_y, p_rest, w, o: tl.constexpr):
    at_label = (s_label - statistics.max_s) * w.inverse
    log_q_y = log_sigmoid(at_label, statistics.log_s)
    log_q_rest = log_sigmoid(statistics.log_s, at_label)
    if o.plain:
        at_label = (t_label - statistics.max_t) * w.inverse
        log_p_y = log_sigmoid(at_label, statistics.log_t)
        log_p_rest = log_sigmoid(statistics.log_t, at_label)
        return LabelPart(tl.exp(log_p_y), tl.exp(log_p_rest), log_p_y, log_p_rest, log_q_y, log_q_rest)
    else:
        return LabelPart(p_y, p_rest, log_of(p_y), log_of(p_rest), log_q_y, log_q_rest)


@triton.jit
def read_row(x, steps, w, reads_target: tl.constexpr, o: tl.constexpr, BLOCK: tl.constexpr):
    """The first pass: running maxima and sums, all in one reading of the row."""
    zero = tl.full((), 0.0, tl.float32)
    lowest = tl.full((), -INFINITY, tl.float32)
    max_1, max_s, max_t, max_2 = lowest, lowest, lowest, lowest
    sum_1, sum_s, sum_t, sum_2 = zero, zero, zero, zero
    soft_rest, count, label_mass = zero, zero, zero
    for step in range(0, steps):
        at = block_of(step, steps, BLOCK, False)
        s = read_student(x, at)
        if o.ce:
            max_1, sum_1 = _merge(max_1, sum_1, s, 1.0)
        if o.spreads_label:
            label_mass += tl.sum(label_target(x, at, w, o), 0)
        if o.divergence:
            allowed = without_label(x, at, allowed_classes(x, at, o), o)
        if o.counts:
            count += tl.sum(tl.where(allowed, 1.0, 0.0), 0)
        if o.between_softmaxes:
            max_s, sum_s = _merge(max_s, sum_s, _only(allowed, s, o), w.inverse)
            if reads_target and o.form == LOGITS:
                t = _target_logits(x, at, s, w, o)
                max_t, sum_t = _merge(max_t, sum_t, _only(allowed, t, o), w.inverse)
                if o.second:
                    t = _second_logits(x, at, o)
                    max_2, sum_2 = _merge(max_2, sum_2, _only(allowed, t, o), w.inverse)
            if o.sums_given:
                sum_t += tl.sum(tl.where(allowed, _given(x, at, o), 0.0), 0)
                if o.second:
                    second = tl.load(x.second + at, mask=allowed, other=0.0).to(tl.float32)
                    sum_2 += tl.sum(second, 0)
            if o.mixes and o.soft and o.leaves_out:
                soft_rest += tl.sum(tl.load(x.soft + at, mask=allowed, other=0.0).to(tl.float32), 0)
    return max_1, sum_1, max_s, sum_s, max_t, sum_t, max_2, sum_2, soft_rest, count, label_mass


@triton.jit
def statistics_of(x, steps, w, reads_target: tl.constexpr, o: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics and LabelPart of a row."""
    max_1, sum_1, max_s, sum_s, max_t, sum_t, max_2, sum_2, soft_rest, count, label_mass = read_row(
        x, steps, w, reads_target, o, BLOCK
    )
    if o.ce and not o.spreads_label:
        label_mass = 1.0
        if o.class_weight:
            known = x.label >= 0
            label_mass = tl.load(x.class_weight + x.label, mask=known, other=0.0).to(tl.float32)
    log_t, log_2 = tl.log(sum_t), tl.log(sum_2)
    log_t_all, log_2_all = log_t, log_2
    max_t, max_2 = _finite_or_zero(max_t), _finite_or_zero(max_2)
    scale, mass = 1.0, 1.0
    p_y, p_rest = 0.0, 0.0
    if o.sums_given:
        mass = sum_t
    found = Statistics(
        _finite_or_zero(max_1), 1.0 / sum_1, tl.log(sum_1), _finite_or_zero(max_s), 1.0 / sum_s, tl.log(sum_s),
        max_t, 1.0 / sum_t, log_t, log_t_all, max_2, log_2_all, scale, mass, 1.0 / tl.maximum(count, 1.0), label_mass,
    )  # fmt: skip
    if o.leaves_out and o.between_softmaxes:
        s_label, t_label, second_label = _label_logits(x, w, o)
        if not o.plain:
            second_rest = log_2 if o.form == LOGITS else sum_2
            p_y, p_rest = _masses(x, found, t_label, second_label, sum_t, second_rest, soft_rest, w, o)
            scale = 1.0 / tl.where(p_rest > 0, p_rest, 1.0)
            mass = excess(p_rest, scale)
            log_t_all = _with_label(log_t, (t_label - max_t) * w.inverse)
            log_2_all = _with_label(log_2, (second_label - max_2) * w.inverse)
        part = _label_part(found, s_label, t_label, p_y, p_rest, w, o)
    else:
        part = LabelPart(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    found = Statistics(
        found.max_1, found.inverse_1, found.log_1, found.max_s, found.inverse_s, found.log_s,
        max_t, found.inverse_t, log_t, log_t_all, max_2, log_2_all, scale, mass, found.inverse_count, label_mass,
    )  # fmt: skip
    return found, part


@triton.jit
def _logit_block(x, at, found, w, o: tl.constexpr):
    s = read_student(x, at)
    t = _target_logits(x, at, s, w, o)
    valid = without_label(x, at, allowed_classes(x, at, o), o)
    valid = valid & ~((s == t) & (tl.abs(s) == INFINITY))
    gap = (s - t) * w.inverse if o.kind == LOG_COSH else s - t
    return Block(s, tl.zeros_like(s), logit_term(gap, valid, w, found.inverse_count, o))


@triton.jit
def _softmax_block(x, at, found, w, reads_target: tl.constexpr, o: tl.constexpr):
    s = read_student(x, at)
    allowed = allowed_classes(x, at, o)
    kept = without_label(x, at, allowed, o)
    below = (s - found.max_s) * w.inverse
    log_q = tl.where(kept, below - found.log_s, -INFINITY)
    q = tl.where(kept, tl.exp(below) * found.inverse_s, 0.0)
    if not reads_target:
        p, log_p, gap = tl.zeros_like(q), log_q, tl.zeros_like(q)
    elif o.plain:
        t = _target_logits(x, at, s, w, o)
        below = (t - found.max_t) * w.inverse
        log_p = tl.where(kept, below - found.log_t, -INFINITY)
        p = tl.where(kept, tl.exp(below) * found.inverse_t, 0.0)
        # Nearly equal logits have an exact difference; their logarithms of probabilities do not.
        gap = ((t - s) - (found.max_t - found.max_s)) * w.inverse - (found.log_t - found.log_s)
    else:
        p = tl.where(kept, _mixed(x, at, s, allowed, found, w, o) * found.scale, 0.0)
        log_p = log_of(p)
        gap = log_p - log_q
    return Block(s, q, softmax_term(q, log_q, p, log_p, gap, w, found.inverse_count, o))


@triton.jit
def read_block(x, at, found, w, reads_target: tl.constexpr, o: tl.constexpr):
    """q and the terms of a block, not yet weighted by class."""
    if o.between_logits:
        return _logit_block(x, at, found, w, o)
    else:
        return _softmax_block(x, at, found, w, reads_target, o)

