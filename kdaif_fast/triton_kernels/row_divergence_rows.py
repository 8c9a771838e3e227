"""How row_divergence's Triton kernels read a row: its settings, and what a block of it holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_divergence_terms import INFINITY, LOG_COSH, LOGITS, TOP_K, Settings, log_of, logit_term, softmax_term


class Row(NamedTuple):
    """Where a row lies and how long it is.

    Pointers take positions in the student's row (of top-k targets: of the k), so the teacher's begin before its row.
    """

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
    """Logits, -inf beyond the row."""
    return tl.load(x.student + at, mask=at < x.end, other=-INFINITY).to(tl.float32)


@triton.jit
def inside_divergence(x, at, o: tl.constexpr):
    """Which positions the teacher has."""
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
def only_kept(kept, values, o: tl.constexpr):
    """-inf in place of logits that do not count; those beyond the row are -inf already."""
    return tl.where(kept, values, -INFINITY) if o.mask or o.sliced or o.leaves_out else values


@triton.jit
def interpolated(t, s, w, o: tl.constexpr):
    """The logits that make the target: the teacher's, and the student's own."""
    if o.interpolates:
        share = w.interpolation
        return tl.where(share == 1, t, tl.where(share == 0, s, share * t + (1.0 - share) * s))
    else:
        return t


@triton.jit
def target_logits(x, at, s, w, o: tl.constexpr):
    """The logits that make the target, in a block."""
    t = tl.load(x.teacher + at, mask=inside_divergence(x, at, o), other=-INFINITY).to(tl.float32)
    return interpolated(t, s, w, o)


@triton.jit
def second_logits(x, at, o: tl.constexpr):
    """The second teacher's logits in a block."""
    return tl.load(x.second + at, mask=inside_divergence(x, at, o), other=-INFINITY).to(tl.float32)


@triton.jit
def given_probabilities(x, at, o: tl.constexpr):
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
def two_teachers(first, second, gate):
    """The mixture of two teachers' probabilities."""
    return (1.0 - gate) * first + gate * second


@triton.jit
def _mixed(x, at, s, allowed, found, w, o: tl.constexpr):
    """A target that is no plain softmax, with the label and not scaled."""
    if o.form == LOGITS:
        t = tl.where(allowed, target_logits(x, at, s, w, o), -INFINITY)
        p = tl.exp((t - found.max_t) * w.inverse - found.log_t_all)
    else:
        p = given_probabilities(x, at, o)
    if o.second:
        if o.form == LOGITS:
            t = tl.where(allowed, second_logits(x, at, o), -INFINITY)
            p = two_teachers(p, tl.exp((t - found.max_2) * w.inverse - found.log_2_all), w.gate)
        else:
            second = tl.load(x.second + at, mask=inside_divergence(x, at, o), other=0.0).to(tl.float32)
            p = two_teachers(p, second, w.gate)
    if o.mixes:
        label = tl.where(at == x.label, 1.0, 0.0)
        if o.soft:
            label = tl.load(x.soft + at, mask=allowed, other=0.0).to(tl.float32)
        p = (1.0 - w.label_mix) * p + w.label_mix * label
    return tl.where(allowed, p, 0.0)


@triton.jit
def softmax_1(s, found):
    """The student's softmax at temperature 1."""
    return tl.exp(s - found.max_1) * found.inverse_1


@triton.jit
def label_target(x, at, w, o: tl.constexpr):
    """The cross-entropy's target in a block."""
    a = tl.where(at == x.label, 1.0, 0.0)
    if o.soft:
        a = tl.load(x.soft + at, mask=at < x.end, other=0.0).to(tl.float32)
    if o.smooths:
        a = tl.where(at < x.end, (1.0 - w.smoothing) * a + w.smoothing / x.V, 0.0)
    if o.class_weight:
        a = a * tl.load(x.class_weight + at, mask=at < x.end, other=0.0).to(tl.float32)
    return a


@triton.jit
def _logit_block(x, at, found, w, o: tl.constexpr):
    s = read_student(x, at)
    t = target_logits(x, at, s, w, o)
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
        t = target_logits(x, at, s, w, o)
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
