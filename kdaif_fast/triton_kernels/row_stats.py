"""row_stats in Triton: one program a row; two passes over it in blocks (maxima; sums), a third for small divergences.

Formulas are in reference/row_stats.py. Floor: 2 reads of V elements; later passes find rows of up to some 64 KiB in the
caches. float64 is not for Triton, whose scalar arguments are float32: it goes to the reference.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grids import programs

WIDEST_BLOCK = 2048
STATS_ALONE, STATS_OF_BOTH = 6, 14  # rows of the packed result, in the order of reference/row_stats.py

SMALL_KL = tl.constexpr(1 / 64)  # below this, a difference of sums has lost too many digits
NEAR = tl.constexpr(0.25)  # log-probabilities closer than this take the series


@triton.jit
def _row_top(row, V, BLOCK: tl.constexpr):
    """The largest logit, and the lowest index that has it; the first NaN's index if there is one."""
    largest = -float("inf")
    index = 0
    first_nan = V + 0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        top = tl.max(x, 0)
        here = tl.min(tl.where(x == top, at, V), 0)
        index = tl.where(top > largest, here, index)
        largest = tl.where(top > largest, top, largest)
        first_nan = tl.minimum(first_nan, tl.min(tl.where(x != x, at, V), 0))
    return largest, tl.where(first_nan < V, first_nan, index)


@triton.jit
def _divergence(a, log_a, b, log_b):
    """Terms of KL(a || b) of normalised distributions: a log(a / b) + b - a, never negative; a series where near."""
    x = log_a - log_b
    series = 1.0 / 40320 * x - 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x - 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x - 1.0 / 6
    series = series * x + 0.5
    value = tl.where(tl.abs(x) < NEAR, a * x * x * series, a * x + (b - a))
    return tl.where(a > 0, value, a + b)


@triton.jit
def _write_side(
    stats,  # where this row's first statistic goes; the next ones are `step` further each
    step,
    total,  # sum of e = exp(x), x = (logit - largest) / T; NaN if the row has no softmax
    mean,  # sum of e x
    mass,  # sum of e over the class slice
    x_of,  # x of the class whose margin is wanted: the label, or else the arg-max
    x_other,  # the largest x of the other classes
    known,
    LABELS: tl.constexpr,
    MASS: tl.constexpr,
):
    nan = float("nan")
    log_total = tl.log(total)
    defined = total == total
    tl.store(stats, 1.0 / total)
    if LABELS:
        shown = defined & known
        tl.store(stats + step, tl.where(shown, tl.exp(x_of) / total, nan))
        tl.store(stats + 2 * step, tl.where(shown, x_of - x_other, nan))
        tl.store(stats + 4 * step, tl.where(shown, log_total - x_of, nan))
    else:
        tl.store(stats + step, nan)
        tl.store(stats + 2 * step, tl.where(defined, x_of - x_other, nan))
        tl.store(stats + 4 * step, nan)
    tl.store(stats + 3 * step, log_total - mean / total)
    if MASS:
        tl.store(stats + 5 * step, mass / total)
    else:
        tl.store(stats + 5 * step, nan)


@triton.jit(do_not_specialize=["first_class", "last_class", "ignore_index"])
def _row_stats_kernel(
    student,  # [N, V], student_stride elements from row to row
    teacher,  # [N, V], teacher_stride elements from row to row; read if TEACHER
    labels,  # [N], read if LABELS; what depends on a label that is no class is NaN
    stats,  # [6 or 14, N]
    argmax,  # [1 or 2, N]
    V,
    student_stride,
    teacher_stride,
    temperature,
    first_class,  # the slice whose mass is wanted, if MASS
    last_class,
    ignore_index,
    TEACHER: tl.constexpr,
    LABELS: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    s_row = student + row * student_stride
    t_row = teacher + row * teacher_stride
    inverse = 1.0 / temperature

    max_s, top_s = _row_top(s_row, V, BLOCK)
    of_s = top_s.to(tl.int64)
    max_t, of_t = max_s, of_s
    if TEACHER:
        max_t, top_t = _row_top(t_row, V, BLOCK)
        of_t = top_t.to(tl.int64)
        tl.store(argmax + N + row, of_t)
    tl.store(argmax + row, of_s)
    known = True
    if LABELS:
        label = tl.load(labels + row)
        known = (label != ignore_index) & (label >= 0) & (label < V)
        of_s = tl.where(known, label, of_s)
        of_t = tl.where(known, label, of_t)

    total_s, mean_s, mass_s, other_s = 0.0, 0.0, 0.0, -float("inf")
    total_t, mean_t, mass_t, other_t = 0.0, 0.0, 0.0, -float("inf")
    forward, reverse = 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log_q = (tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_s) * inverse
        q = tl.exp(log_q)
        total_s += tl.sum(q, 0)
        # A class without probability contributes nothing, even where its logit is -inf; NaN stays.
        mean_s += tl.sum(tl.where(q == 0, 0.0, q * log_q), 0)
        other_s = tl.maximum(other_s, tl.max(tl.where(at == of_s, -float("inf"), log_q), 0))
        if MASS:
            mass_s += tl.sum(tl.where((at >= first_class) & (at < last_class), q, 0.0), 0)
        if TEACHER:
            log_p = (tl.load(t_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_t) * inverse
            p = tl.exp(log_p)
            total_t += tl.sum(p, 0)
            mean_t += tl.sum(tl.where(p == 0, 0.0, p * log_p), 0)
            other_t = tl.maximum(other_t, tl.max(tl.where(at == of_t, -float("inf"), log_p), 0))
            if MASS:
                mass_t += tl.sum(tl.where((at >= first_class) & (at < last_class), p, 0.0), 0)
            forward += tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), 0)
            reverse += tl.sum(tl.where(q == 0, 0.0, q * (log_q - log_p)), 0)

    x_of = (tl.load(s_row + of_s).to(tl.float32) - max_s) * inverse
    _write_side(stats + row, N, total_s, mean_s, mass_s, x_of, other_s, known, LABELS, MASS)
    if TEACHER:
        x_of = (tl.load(t_row + of_t).to(tl.float32) - max_t) * inverse
        _write_side(stats + 6 * N + row, N, total_t, mean_t, mass_t, x_of, other_t, known, LABELS, MASS)
        log_ratio = tl.log(total_s) - tl.log(total_t)
        forward = forward / total_t + log_ratio
        reverse = reverse / total_s - log_ratio
        if (forward < SMALL_KL) | (reverse < SMALL_KL):
            forward, reverse = 0.0, 0.0
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = (tl.load(s_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_s) * inverse
                log_p = (tl.load(t_row + at, mask=at < V, other=-float("inf")).to(tl.float32) - max_t) * inverse
                p, q, log_q = tl.exp(log_p) / total_t, tl.exp(x) / total_s, x - log_ratio
                forward += tl.sum(_divergence(p, log_p, q, log_q), 0)
                reverse += tl.sum(_divergence(q, log_q, p, log_p), 0)
        # Rounding can put the divergence of equal distributions a hair below 0; NaN must stay NaN.
        tl.store(stats + 12 * N + row, tl.where(forward < 0, 0.0, forward))
        tl.store(stats + 13 * N + row, tl.where(reverse < 0, 0.0, reverse))


def block_for(V: int) -> tuple[int, int]:
    """Block width and warps for rows of V elements."""
    block = min(triton.next_power_of_2(V), WIDEST_BLOCK)
    return block, max(4, block // 128)  # 4 elements a thread: with 8, ptxas spills on sm_80


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def row_stats(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    first_class: int,
    class_count: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Statistics [6 or 14, N], float32, and arg-maxima int64 [1 or 2, N]."""
    N, V = student.shape
    has_teacher = teacher is not None
    count = STATS_OF_BOTH if has_teacher else STATS_ALONE
    stats = torch.empty((count, N), dtype=torch.float32, device=student.device)
    argmax = torch.empty((2 if has_teacher else 1, N), dtype=torch.int64, device=student.device)
    if N == 0:
        return stats, argmax
    student = _dense_rows(student)
    other = student if teacher is None else _dense_rows(teacher)
    block, warps = block_for(V)
    with _on_device_of(student):
        _row_stats_kernel[(programs("row_stats", N),)](
            student,
            other,
            argmax if labels is None else labels.contiguous(),
            stats,
            argmax,
            V,
            student.stride(0),
            other.stride(0),
            temperature,
            first_class,
            first_class + class_count,
            ignore_index,
            TEACHER=has_teacher,
            LABELS=labels is not None,
            MASS=class_count > 0,
            BLOCK=block,
            num_warps=warps,
        )
    return stats, argmax
