"""row_divergence in Triton: one program a row, which it reads in blocks; formulas in reference/row_divergence.py.

Floor: 2 reads of V elements for the loss, and 1 write for the gradient. A first pass finds maxima and sums together; a
last one forms values and gradient together. Only where the gradient needs a sum over the row that the first pass cannot
know (terms that are not linear in log q, mixed targets, class weights) a pass lies between. Rows of one block are read
once: the compiler merges the passes' reads. Otherwise each pass goes the other way than the one before.

Curvature products: a program works on one row and up to 4 of its K tangents. With S bytes a row, three passes over the
logits and two readings and a writing of each tangent cost 3 * 2 S + 3 K S for K <= 4. A program that took one tangent
at a time would cost 6 S + 3 S for each; one that looped over all K, (2 + 2 K) * 2 S + 3 K S.

float64 is not for Triton, whose scalar arguments are float32: it goes to the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    statistics_of,
    inside_divergence,
)
from .row_divergence_terms import DECOUPLED, KL, LOGIT_MSE, LOGITS, TOP_K, Options, excess, times

MOST_TANGENTS = 4  # of a program
# Wider blocks need more registers than there are: no configuration used here spills (tests/triton_kernels).
WIDEST_BLOCK = 4096


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


@triton.jit
def _row_divergence_kernel(
    student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, rows,
    loss,  # [N], written if o.loss
    grad,  # [N, V], written if o.grad
    N, V, C, top_k, student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
    temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew,
    o: tl.constexpr, TOP_K_WIDTH: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w = read_settings(
        rows, row, N, temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew, o.rows
    )
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
def _label_product(x, at, q, v, sum_q, v_label, part, kd):
    """The curvature of the label's own part times v, in s / T."""
    q_y, q_rest = tl.exp(part.log_q_y), tl.exp(part.log_q_rest)
    all_q = q_rest * q + tl.where(at == x.label, q_y, 0.0)
    mean = q_rest * sum_q + q_y * v_label
    product = (part.p_y + part.p_rest) * all_q[None, :] * (v - mean[:, None])
    return times(kd, product - part.p_rest * q[None, :] * (v - sum_q[:, None]))


@triton.jit
def _row_divergence_hvp_kernel(
    tangents, out,  # [K, N, V]
    student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, rows,
    K, tangent_stride, tangent_row_stride,
    N, V, C, top_k, student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
    temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew,
    o: tl.constexpr, TOP_K_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_tangent = tl.program_id(1).to(tl.int64) * TILE
    w = read_settings(
        rows, row, N, temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew, o.rows
    )
    x, scale, ignored = _open_row(
        row, student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, N, V, C, top_k,
        student_stride, teacher_stride, second_stride, soft_stride, mask_stride, first_class, ignore_index,
        o, TOP_K_WIDTH,
    )  # fmt: skip
    steps = 1 if ONE_BLOCK else tl.cdiv(x.end, BLOCK)
    found, part = statistics_of(x, steps, w, o.product_sums_target, o, BLOCK)
    u_row = tangents + first_tangent * tangent_stride + row * tangent_row_stride
    count = K - first_tangent

    sum_1 = tl.zeros((TILE,), tl.float32)
    sum_q = tl.zeros((TILE,), tl.float32)
    sum_along = tl.zeros((TILE,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    if o.ce or o.between_softmaxes:
        for step in range(0, steps):
            at = block_of(step, steps, BLOCK, True)
            b = _read(x, at, found, w, o.product_reads_target, o)
            u = _tangents(u_row, at, at < x.end, count, tangent_stride, TILE)
            if o.ce:
                sum_1 += tl.sum(softmax_1(b.s, found)[None, :] * u, 1)
            if o.between_softmaxes:
                v = tl.where(inside_divergence(x, at, o)[None, :], u, 0.0) if o.sliced else u
                sum_q += tl.sum(b.q[None, :] * v, 1)
                if o.product_reads_target:
                    curvature, block_mass = _kept(x, at, b.term, o)
                    sum_along += tl.sum(curvature[None, :] * v, 1)
                    total += tl.sum(curvature, 0)
                    mass += tl.sum(block_mass, 0)
    if o.mass_known:
        mass = found.mass * _linear_weight(w, o)
    sum_along -= sum_q * total
    v_label = tl.zeros((TILE,), tl.float32)
    if o.kind == DECOUPLED and o.kd:
        spot = tl.where(x.label_counts, x.label, -1) + tl.zeros((1,), tl.int32)
        v_label = tl.sum(_tangents(u_row, spot, (spot >= 0) & (spot < x.end), count, tangent_stride, TILE), 1)

    all_steps = 1 if ONE_BLOCK else tl.cdiv(V, BLOCK)  # of rows that are ignored, too
    for step in range(0, all_steps):
        at = block_of(step, all_steps, BLOCK, False)
        b = _read(x, at, found, w, o.product_reads_target, o)
        u = _tangents(u_row, at, at < x.end, count, tangent_stride, TILE)
        h = tl.zeros_like(u)
        if o.divergence:
            v = tl.where(inside_divergence(x, at, o)[None, :], u, 0.0) if o.sliced else u
            if o.between_logits:
                h = _kept(x, at, b.term, o)[0][None, :] * v
            else:
                centred = v - sum_q[:, None]
                h = b.q[None, :] * (mass * centred - sum_along[:, None])
                if o.product_reads_target:
                    h += _kept(x, at, b.term, o)[0][None, :] * centred
                if o.kind == DECOUPLED and o.kd:
                    h += _label_product(x, at, b.q, v, sum_q, v_label, part, w.kd)
            if o.kind != LOGIT_MSE:
                h = h * (w.inverse * w.inverse)
        if o.ce:
            softmax = softmax_1(b.s, found)[None, :]
            h += times(w.ce, found.label_mass * softmax * (u - sum_1[:, None]))
        h = tl.where(ignored, 0.0, scale * h)
        k = first_tangent + tl.arange(0, TILE)
        to = out + (k * N + row)[:, None] * V + at[None, :]
        tl.store(to, h.to(out.dtype.element_ty), mask=(k < K)[:, None] & (at < V)[None, :])


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def candidates(V: int, rows_of_tile: int = 1) -> tuple[tuple[int, int], ...]:
    """Block widths and warps to choose from for rows of V elements, of which a program holds several.

    A thread has 8 elements: one load of 16 bytes of the narrow types, and few enough for every option's registers.
    """
    widest = WIDEST_BLOCK // rows_of_tile
    if _interpreted():
        return ((min(triton.next_power_of_2(V), 512), 4),)
    if V <= widest:
        block = max(triton.next_power_of_2(V), 32)
        return ((block, max(block * rows_of_tile // 256, 1)),)
    return ((widest // 4, 4), (widest // 2, 8), (widest, 16))


def register_limit(o: Options) -> int | None:
    """What a thread may have at most: left to itself, the assembler rather spills a little than passes a threshold."""
    return None if o.light or _interpreted() else 128


@functools.cache
def _tuned(kernel: Any, V: int, rows_of_tile: int, limit: int | None) -> Any:
    """The kernel in the fastest of its configurations, found out once for each V, dtype and set of options."""
    configurations = [
        triton.Config({"BLOCK": block, "ONE_BLOCK": block >= V}, num_warps=warps, maxnreg=limit)
        for block, warps in candidates(V, rows_of_tile)
    ]
    return triton.autotune(configurations, key=["V", "o"])(kernel)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _options(
    student: Tensor,
    teacher: Tensor | None,
    second: Tensor | None,
    labels: Tensor | None,
    soft_labels: Tensor | None,
    class_weight: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    rows: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
) -> Options:
    kind, form, mixes, excludes, first_class, class_count, _ = choices

    def used(index: int) -> bool:
        return rows is not None or numbers[index] != 0

    has_other = kind in (KL.value, DECOUPLED.value)
    return Options(
        kind=kind,
        form=form,
        mixes=bool(mixes),
        excludes=bool(excludes),
        ce=used(1),
        kd=teacher is not None and used(2),
        other=teacher is not None and has_other and used(3),
        second=second is not None and (form != LOGITS.value or bool(mixes)),
        labels=labels is not None,
        soft=soft_labels is not None,
        class_weight=class_weight is not None,
        mask=mask is not None,
        weight=weight is not None,
        rows=rows is not None,
        interpolates=form == LOGITS.value and (rows is not None or numbers[5] != 1),
        smooths=numbers[7] != 0,
        sliced=(first_class, class_count) != (0, student.shape[1]),
    )


def _arguments(
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
) -> tuple[dict[str, Any], Options]:
    """The kernels' common arguments by name."""
    options = _options(
        student, teacher, second, labels, soft_labels, class_weight, mask, weight, rows, numbers, choices
    )
    N, V = student.shape
    top_k = indices.shape[1] if indices is not None else 0

    def dense(x: Tensor | None) -> Tensor:
        return student if x is None else _dense_rows(x)  # a pointer that is not used

    tensors = {
        "student": _dense_rows(student),
        "teacher": dense(teacher),
        "indices": student if indices is None else indices.contiguous(),
        "second": dense(second),
        "labels": student if labels is None else labels.contiguous(),
        "soft_labels": dense(soft_labels),
        "class_weight": student if class_weight is None else class_weight.contiguous(),
        "mask": student if mask is None else _dense_rows(mask).view(torch.uint8),
        "weight": student if weight is None else weight.contiguous(),
        "rows": student if rows is None else rows.contiguous(),
    }
    strides = {
        "student_stride": tensors["student"].stride(0),
        "teacher_stride": tensors["teacher"].stride(0),
        "second_stride": tensors["second"].stride(0),
        "soft_stride": tensors["soft_labels"].stride(0),
        "mask_stride": 0 if mask is None or mask.shape[0] == 1 else tensors["mask"].stride(0),
    }
    names = ("temperature", "ce", "kd", "other", "label_mix", "interpolation", "gate", "smoothing", "skew")
    sizes = {"N": N, "V": V, "C": choices[5], "top_k": top_k, "first_class": choices[4], "ignore_index": choices[6]}
    settings = {name: float(number) for name, number in zip(names, numbers, strict=True)}
    width = triton.next_power_of_2(max(top_k, 1))
    return {**tensors, **strides, **sizes, **settings, "TOP_K_WIDTH": width}, options


def _launch(loss: Tensor | None, grad: Tensor | None, args: Sequence[Any]) -> None:
    student = args[0]
    N, V = student.shape
    if N == 0:
        return
    arguments, options = _arguments(*args)
    options = dataclasses.replace(options, loss=loss is not None, grad=grad is not None)
    results = {"loss": student if loss is None else loss, "grad": student if grad is None else grad}
    with _on_device_of(student):
        _tuned(_row_divergence_kernel, V, 1, register_limit(options))[(N,)](**arguments, **results, o=options)


def row_divergence(student: Tensor, *args: Any) -> Tensor:
    """Loss of each row: [N], float32. Arguments as the reference takes them."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    _launch(loss, None, (student, *args))
    return loss


def row_divergence_with_grad(student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Loss of each row, [N], and its gradient, [N, V]."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(loss, grad, (student, *args))
    return loss, grad


def row_divergence_grad(student: Tensor, *args: Any) -> Tensor:
    """Gradient with respect to the student's logits: [N, V]."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(None, grad, (student, *args))
    return grad


def row_divergence_hvp(tangents: Tensor, gauss_newton: bool, student: Tensor, *args: Any) -> Tensor:
    """Hessian, or Gauss-Newton product, of each row's loss times K tangents: [K, N, V]."""
    out = torch.empty(tangents.shape, dtype=student.dtype, device=student.device)
    K, N, V = tangents.shape
    if K == 0 or N == 0:
        return out
    arguments, options = _arguments(student, *args)
    tangents = _dense_rows(tangents)
    tile = min(triton.next_power_of_2(K), MOST_TANGENTS)
    with _on_device_of(student):
        _tuned(_row_divergence_hvp_kernel, V, tile, register_limit(options))[(N, triton.cdiv(K, tile))](
            tangents=tangents,
            out=out,
            K=K,
            tangent_stride=tangents.stride(0),
            tangent_row_stride=tangents.stride(1),
            o=dataclasses.replace(options, gauss_newton=gauss_newton),
            TILE=tile,
            **arguments,
        )
    return out
