"""The two Triton kernels of row_divergence: values and gradients, and curvature products."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_divergence_rows import (
    Block,
    Row,
    block_of,
    label_target,
    read_block,
    read_settings,
    read_student,
    rest_of_top_k,
    softmax_1,
)
from .row_divergence_sums import statistics_of
from .row_divergence_terms import DECOUPLED, LOGIT_MSE, TOP_K, excess, times

# Arguments whose values are no reason to compile once more.
NUMBERS = ("N", "K", "top_k", "ignore_index")


@triton.jit
def _open_row(
    row, student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, N, V, C, top_k,
    student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
    o: tl.constexpr, TOP_K_WIDTH: tl.constexpr,
):  # fmt: skip
    """Row, what its loss is multiplied by (NaN if the label is no class), and whether it is ignored."""
    scale = tl.load(weight + row) if o.weight else tl.full((), 1.0, tl.float32)
    ignored = row < 0
    label = tl.full((), -1, tl.int32)
    if o.labels:
        given = tl.load(labels + row)
        ignored = given == ignore_index
        legal = (given >= 0) & (given < V)
        label = tl.where(legal, given, -1).to(tl.int32)
        scale = tl.where(legal, scale, float("nan"))
    t_row = teacher + row * teacher_stride
    indices_row = indices + row * top_k
    mask_row = mask + row * mask_stride - first_class
    rest_share = 0.0
    if o.form == TOP_K and o.divergence:
        rest_share = rest_of_top_k(t_row, top_k, C, TOP_K_WIDTH)
    else:
        t_row = t_row - first_class
    j = label - first_class
    label_counts = (label >= 0) & (j >= 0) & (j < C)
    if o.mask:
        label_counts = label_counts & (tl.load(mask_row + label, mask=label_counts, other=0) != 0)
    x = Row(
        student + row * student_stride, t_row, indices_row, second + row * second_stride - first_class,
        soft_labels + row * soft_stride, class_weight, mask_row, V, C, tl.where(ignored, 0, V), first_class, top_k,
        rest_share, label, label_counts,
    )  # fmt: skip
    return x, scale, ignored


@triton.jit
def _cross_entropy_at_label(x, found):
    """The part of the cross-entropy that a single label has."""
    s = tl.load(x.student + x.label, mask=x.label >= 0, other=0.0).to(tl.float32)
    return found.label_mass * (found.log_1 - (s - found.max_1))


@triton.jit
def _label_value(part, kd, o: tl.constexpr):
    value = excess(part.p_y, part.log_p_y - part.log_q_y) + excess(part.p_rest, part.log_p_rest - part.log_q_rest)
    return times(kd, value)


@triton.jit
def _label_grad(x, at, q, part, kd):
    """The gradient of the label's own part in s / T."""
    mass = part.p_y + part.p_rest
    others = q * (mass * tl.exp(part.log_q_rest) - part.p_rest)
    here = mass * tl.exp(part.log_q_y) - part.p_y
    return times(kd, others + tl.where(at == x.label, here, 0.0))


@triton.jit
def _linear_weight(w, o: tl.constexpr):
    """The weight of the part whose terms are linear in log q."""
    return w.other if o.kind == DECOUPLED else w.kd


@triton.jit
def _weighted(x, at, values, o: tl.constexpr):
    """Times the classes' weights, if there are any."""
    if o.class_weight:
        return values * tl.load(x.class_weight + at, mask=at < x.end, other=0.0).to(tl.float32)
    else:
        return values


@triton.jit
def _values(x, at, b, found, w, o: tl.constexpr):
    """What a block adds to the loss."""
    total = 0.0
    if o.divergence:
        total += tl.sum(_weighted(x, at, b.term.value, o), 0)
    if o.spreads_label:
        a = label_target(x, at, w, o)
        log_q = b.s - found.max_1 - found.log_1
        total -= times(w.ce, tl.sum(tl.where(a == 0, 0.0, a * log_q), 0))
    return total


@triton.jit
def _gradient(x, at, b, first_sum, found, part, w, o: tl.constexpr):
    """A block of the gradient."""
    g = tl.zeros_like(b.s)
    if o.divergence:
        g = _weighted(x, at, b.term.first, o)
        if o.between_softmaxes:
            g -= b.q * first_sum
        if o.kind == DECOUPLED and o.kd:
            g += _label_grad(x, at, b.q, part, w.kd)
        if o.kind != LOGIT_MSE:
            g = g * w.inverse
    if o.ce:
        g += times(w.ce, found.label_mass * softmax_1(b.s, found) - label_target(x, at, w, o))
    return g


@triton.jit
def _read(x, at, found, w, reads_target: tl.constexpr, o: tl.constexpr):
    if o.divergence:
        return read_block(x, at, found, w, reads_target, o)
    else:
        s = read_student(x, at)
        return Block(s, s, s)


@triton.jit(do_not_specialize=NUMBERS)
def row_divergence_kernel(
    student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, rows,
    loss,  # [N], written if o.loss
    grad,  # [N, V], written if o.grad
    N, V, C, top_k, student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
    temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew,
    o: tl.constexpr, TOP_K_WIDTH: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's loss and gradient."""
    row = tl.program_id(0).to(tl.int64)
    w = read_settings(rows, row, N, temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew, o.rows)
    x, scale, ignored = _open_row(
        row, student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, N, V, C, top_k,
        student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
        o, TOP_K_WIDTH,
    )  # fmt: skip
    steps = 1 if ONE_BLOCK else tl.cdiv(x.end, BLOCK)
    found, part = statistics_of(x, steps, w, True, o, BLOCK)

    value = 0.0
    if o.ce and not o.spreads_label:
        value += times(w.ce, _cross_entropy_at_label(x, found))
    if o.kind == DECOUPLED and o.kd:
        value += _label_value(part, w.kd, o)
    first_sum = -found.mass * _linear_weight(w, o)
    if o.grad and not o.mass_known:
        first_sum = 0.0
        for step in range(0, steps):
            at = block_of(step, steps, BLOCK, True)
            b = _read(x, at, found, w, True, o)
            first_sum += tl.sum(_weighted(x, at, b.term.first, o), 0)
            if o.loss:
                value += _values(x, at, b, found, w, o)
    if o.grad:
        all_steps = 1 if ONE_BLOCK else tl.cdiv(V, BLOCK)  # of rows that are ignored, too
        for step in range(0, all_steps):
            at = block_of(step, all_steps, BLOCK, o.mass_known)
            b = _read(x, at, found, w, True, o)
            if o.loss and o.mass_known:
                value += _values(x, at, b, found, w, o)
            g = scale * _gradient(x, at, b, first_sum, found, part, w, o)
            g = tl.where(ignored, 0.0, g)
            tl.store(grad + row * V + at, g.to(grad.dtype.element_ty), mask=at < V)
    elif o.divergence or o.spreads_label:
        for step in range(0, steps):
            at = block_of(step, steps, BLOCK, True)
            value += _values(x, at, _read(x, at, found, w, True, o), found, w, o)
    if o.loss:
        tl.store(loss + row, tl.where(ignored, 0.0, scale * value))


@triton.jit
def _kept(x, at, term, o: tl.constexpr):
    """The curvature of a block's terms, and the mass that multiplies the softmax's own."""
    if o.gauss_newton and o.between_softmaxes:
        return _weighted(x, at, term.second - term.first - term.forward, o), _weighted(x, at, term.forward, o)
    else:
        return _weighted(x, at, term.second, o), _weighted(x, at, -term.first, o)


@triton.jit
def _tangents(pointer, at, inside, tangent_count, stride, TILE: tl.constexpr):
    """[TILE, BLOCK]: a block of some tangents of a row."""
    k = tl.arange(0, TILE)
    mask = (k < tangent_count)[:, None] & inside[None, :]
    return tl.load(pointer + k.to(tl.int64)[:, None] * stride + at[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _label_product(x, at, q, u, mean, u_label, part, kd):
    """The curvature of the label's own part times u, in s / T."""
    q_y, q_rest = tl.exp(part.log_q_y), tl.exp(part.log_q_rest)
    all_q = q_rest * q + tl.where(at == x.label, q_y, 0.0)
    all_mean = q_rest * mean + q_y * u_label
    product = (part.p_y + part.p_rest) * all_q[None, :] * (u - all_mean[:, None])
    return times(kd, product - part.p_rest * q[None, :] * (u - mean[:, None]))


class TangentSums(NamedTuple):
    """What a curvature product needs of all classes; TILE each, but for the mass."""

    mean_1: Any  # of the tangent, under the softmax at temperature 1
    mean: Any  # under q
    along: Any  # the curvature of the terms times the centred tangent
    mass: Any  # multiplies the softmax's own curvature


@triton.jit
def _tangent_sums(pointer, count, stride, x, steps, found, w, o: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    mean_1 = tl.zeros((TILE,), tl.float32)
    mean = tl.zeros((TILE,), tl.float32)
    along = tl.zeros((TILE,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    if o.ce or o.between_softmaxes:
        for step in range(0, steps):
            at = block_of(step, steps, BLOCK, True)
            b = _read(x, at, found, w, o.product_reads_target, o)
            u = _tangents(pointer, at, at < x.end, count, stride, TILE)
            if o.ce:
                mean_1 += tl.sum(softmax_1(b.s, found)[None, :] * u, 1)
            if o.between_softmaxes:
                mean += tl.sum(b.q[None, :] * u, 1)
                if o.product_reads_target:
                    curvature, block_mass = _kept(x, at, b.term, o)
                    along += tl.sum(curvature[None, :] * u, 1)
                    total += tl.sum(curvature, 0)
                    mass += tl.sum(block_mass, 0)
    if o.mass_known:
        mass = found.mass * _linear_weight(w, o)
    return TangentSums(mean_1, mean, along - mean * total, mass)


@triton.jit
def _product(x, at, b, u, u_label, sums, found, part, w, o: tl.constexpr):
    """A block of the curvature products. Classes that take no part have q and curvature 0: tangents need no mask."""
    h = tl.zeros_like(u)
    if o.divergence:
        if o.between_logits:
            h = _kept(x, at, b.term, o)[0][None, :] * u
        else:
            centred = u - sums.mean[:, None]
            h = b.q[None, :] * (sums.mass * centred - sums.along[:, None])
            if o.product_reads_target:
                h += _kept(x, at, b.term, o)[0][None, :] * centred
            if o.kind == DECOUPLED and o.kd:
                h += _label_product(x, at, b.q, u, sums.mean, u_label, part, w.kd)
        if o.kind != LOGIT_MSE:
            h = h * (w.inverse * w.inverse)
    if o.ce:
        softmax = softmax_1(b.s, found)[None, :]
        h += times(w.ce, found.label_mass * softmax * (u - sums.mean_1[:, None]))
    return h


@triton.jit(do_not_specialize=NUMBERS)
def row_divergence_hvp_kernel(
    tangents, out,  # [K, N, V]
    student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, rows,
    K, tangent_stride, tangent_row_stride,
    N, V, C, top_k, student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
    temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew,
    o: tl.constexpr, TOP_K_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's curvature times up to TILE of its K tangents."""
    row = tl.program_id(0).to(tl.int64)
    first_tangent = tl.program_id(1).to(tl.int64) * TILE
    w = read_settings(rows, row, N, temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew, o.rows)
    x, scale, ignored = _open_row(
        row, student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, N, V, C, top_k,
        student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
        o, TOP_K_WIDTH,
    )  # fmt: skip
    steps = 1 if ONE_BLOCK else tl.cdiv(x.end, BLOCK)
    found, part = statistics_of(x, steps, w, o.product_sums_target, o, BLOCK)
    u_row = tangents + first_tangent * tangent_stride + row * tangent_row_stride
    count = K - first_tangent

    sums = _tangent_sums(u_row, count, tangent_stride, x, steps, found, w, o, TILE, BLOCK)
    u_label = tl.zeros((TILE,), tl.float32)
    if o.kind == DECOUPLED and o.kd:
        spot = tl.where(x.label_counts, x.label, -1) + tl.zeros((1,), tl.int32)
        u_label = tl.sum(_tangents(u_row, spot, (spot >= 0) & (spot < x.end), count, tangent_stride, TILE), 1)

    all_steps = 1 if ONE_BLOCK else tl.cdiv(V, BLOCK)  # of rows that are ignored, too
    for step in range(0, all_steps):
        at = block_of(step, all_steps, BLOCK, False)
        b = _read(x, at, found, w, o.product_reads_target, o)
        u = _tangents(u_row, at, at < x.end, count, tangent_stride, TILE)
        h = tl.where(ignored, 0.0, scale * _product(x, at, b, u, u_label, sums, found, part, w, o))
        k = first_tangent + tl.arange(0, TILE)
        to = out + (k * N + row)[:, None] * V + at[None, :]
        tl.store(to, h.to(out.dtype.element_ty), mask=(k < K)[:, None] & (at < V)[None, :])
