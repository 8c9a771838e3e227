"""The common case of row_divergence in Triton: cross-entropy with labels, forward KL or cross-entropy with logits.

What tells this kernel from the general one is the price of an element. A thread has maxima and sums of its own over the
whole row, relative to a base that follows its maximum once for each load; they meet at the end of the row. Exponentials
are exp((s - base) / T) = exp2((s - base) * scale), the difference first: a multiply-add would be one instruction less,
but its rounding is more than float32 can hold where logits that stand for excluded classes are very low. The value of
the divergence is formed with the sums, where d = logit - base,
  sum p (d_t - d_s) / T - log(sum_t / sum_s),
and where that is small or not finite, the row is looked at once more, term by term. The label's part of the gradient is
one store after all others. So there are two passes, as in csrc/cuda/row_divergence_fast.cuh.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_divergence_terms import CROSS_ENTROPY, INFINITY, divergence

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234e38)  # finite: -inf is subtracted from nothing
SMALL = tl.constexpr(1.0 / 64)  # below it, a difference of sums has lost too many digits
ANY = tl.constexpr(-1)  # temperature
# Arguments whose values are no reason to compile once more.
NUMBERS = ("ignore_index",)


def squarings_of(temperature: float) -> int:
    """How often an exponential at that temperature must be squared to be the one at temperature 1; ANY if it cannot."""
    return {1.0: 0, 2.0: 1, 4.0: 2}.get(temperature, ANY.value)


@triton.jit
def _tile(step, BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """[BLOCK / GROUP, GROUP] positions. A thread has a row of them: neighbours, if one load can bring those."""
    LANES: tl.constexpr = BLOCK // GROUP
    lane = tl.arange(0, LANES)[:, None]
    i = tl.arange(0, GROUP)[None, :]
    if ALIGNED:
        return step * BLOCK + lane * GROUP + i
    else:
        return step * BLOCK + i * LANES + lane


@triton.jit
def _read(pointer, at, V, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + at, mask=at < V, other=-INFINITY).to(tl.float32)
    else:
        return tl.load(pointer + at).to(tl.float32)


@triton.jit
def _squared(e, SQUARINGS: tl.constexpr):
    for _ in tl.static_range(SQUARINGS):
        e = e * e
    return e


@triton.jit
def _exponential_1(d, e, SQUARINGS: tl.constexpr):
    """exp(d), where e is exp(d / T)."""
    if SQUARINGS == ANY:
        return tl.exp2(d * LOG2_E)
    else:
        return _squared(e, SQUARINGS)


@triton.jit
def _add(
    at, s_row, t_row, V, scale, base_s, base_t, sum_1, sum_s, sum_t, gaps,
    o: tl.constexpr, SQUARINGS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums of each lane with a tile more. `gaps` is of exp(d_t / T) (d_t - d_s), or of exp(d_t / T) (-d_s)."""
    s = _read(s_row, at, V, MASKED)
    above = tl.maximum(base_s, tl.max(s, 1))
    d_s = s - above[:, None]
    e = tl.exp2(d_s * scale)
    shift = base_s - above
    factor = tl.exp2(shift * scale)
    sum_s = sum_s * factor + tl.sum(e, 1)
    if o.ce and o.divergence and SQUARINGS != 0:
        sum_1 = sum_1 * _exponential_1(shift, factor, SQUARINGS) + tl.sum(_exponential_1(d_s, e, SQUARINGS), 1)
    if o.divergence:
        gaps -= shift * sum_t
        t = _read(t_row, at, V, MASKED)
        above_t = tl.maximum(base_t, tl.max(t, 1))
        d_t = t - above_t[:, None]
        p = tl.exp2(d_t * scale)
        shift_t = base_t - above_t
        factor_t = tl.exp2(shift_t * scale)
        gap = -d_s
        if o.kind != CROSS_ENTROPY:
            gaps += shift_t * sum_t
            gap = d_t - d_s
        term = p * gap
        if MASKED:
            term = tl.where(at < V, term, 0.0)
        gaps = gaps * factor_t + tl.sum(term, 1)
        sum_t = sum_t * factor_t + tl.sum(p, 1)
        base_t = above_t
    return above, base_t, sum_1, sum_s, sum_t, gaps


@triton.jit
def _larger(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _plus(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _joined(base_s, base_t, sum_1, sum_s, sum_t, gaps, scale, o: tl.constexpr, SQUARINGS: tl.constexpr):
    """The sums of all lanes."""
    above, above_t = tl.reduce((base_s, base_t), 0, _larger)
    shift, shift_t = base_s - above, base_t - above_t
    factor, factor_t = tl.exp2(shift * scale), tl.exp2(shift_t * scale)
    gaps -= shift * sum_t
    if o.kind != CROSS_ENTROPY:
        gaps += shift_t * sum_t
    sum_1, sum_s, sum_t, gaps = tl.reduce(
        (sum_1 * _exponential_1(shift, factor, SQUARINGS), sum_s * factor, sum_t * factor_t, gaps * factor_t), 0, _plus
    )
    return above, above_t, sum_1, sum_s, sum_t, gaps


@triton.jit
def _terms(at, s_row, t_row, V, scale, inverse, base_s, base_t, sum_s, sum_t, o: tl.constexpr):
    """The divergence's terms in a tile. Nearly equal logits have an exact difference."""
    s, t = _read(s_row, at, V, True), _read(t_row, at, V, True)
    p = tl.exp2((t - base_t) * scale) / sum_t
    if o.kind == CROSS_ENTROPY:
        value = tl.where(p > 0, p * (tl.log(sum_s) - (s - base_s) * inverse), p)
    else:
        gap = ((t - s) - (base_t - base_s)) * inverse - (tl.log(sum_t) - tl.log(sum_s))
        value = divergence(p, gap, tl.exp2((s - base_s) * scale) / sum_s, True)
    return tl.where(at < V, value, 0.0)


@triton.jit
def _gradient(s, t, scale, base_s, base_t, of_1, of_s, of_t, o: tl.constexpr, SQUARINGS: tl.constexpr):
    """Without the label's own part."""
    d = s - base_s
    e = tl.exp2(d * scale)
    g = of_s * e
    if o.divergence:
        g -= of_t * tl.exp2((t - base_t) * scale)
        if o.ce and SQUARINGS != 0:
            g += of_1 * _exponential_1(d, e, SQUARINGS)
    return g


@triton.jit
def _gradient_tile(
    at, s_row, t_row, V, scale, base_s, base_t, of_1, of_s, of_t,
    o: tl.constexpr, SQUARINGS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    s = _read(s_row, at, V, MASKED)
    t = s
    if o.divergence:
        t = _read(t_row, at, V, MASKED)
    return _gradient(s, t, scale, base_s, base_t, of_1, of_s, of_t, o, SQUARINGS)


@triton.jit(do_not_specialize=NUMBERS)
def row_divergence_light_kernel(
    student, teacher, labels, weight,
    loss,  # [N], written if o.loss
    grad,  # [N, V], written if o.grad
    V, student_stride, teacher_stride, ignore_index, temperature, ce, kd,
    o: tl.constexpr, SQUARINGS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's loss and gradient."""
    LANES: tl.constexpr = BLOCK // GROUP
    if ALIGNED:  # multiples of the group as they are; the compiler itself looks for multiples of 16 only
        V = V // GROUP * GROUP
        student_stride = student_stride // GROUP * GROUP
        teacher_stride = teacher_stride // GROUP * GROUP
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row, grad_row = student + row * student_stride, teacher + row * teacher_stride, grad + row * V
    row_weight = tl.load(weight + row) if o.weight else tl.full((), 1.0, tl.float32)
    ignored, legal = False, False
    label = tl.full((), 0, tl.int64)
    if o.labels:
        label = tl.load(labels + row)
        ignored = label == ignore_index
        legal = (label >= 0) & (label < V)
        row_weight = tl.where(legal, row_weight, float("nan"))
    full = 0 if ONE_BLOCK else V // BLOCK
    rest = True if ONE_BLOCK else full * BLOCK < V
    if ignored:
        if o.loss:
            tl.store(loss + row, 0.0)
        if o.grad:
            for step in range(0, tl.cdiv(V, BLOCK)):
                at = _tile(step, BLOCK, GROUP, ALIGNED)
                tl.store(grad_row + at, tl.zeros((LANES, GROUP), grad.dtype.element_ty), mask=at < V)
    else:
        inverse = 1.0 / temperature
        scale = LOG2_E * inverse
        s_label = tl.load(s_row + label, mask=legal, other=0.0).to(tl.float32)
        t_label = tl.load(t_row + label, mask=legal, other=0.0).to(tl.float32)
        base_s = tl.full((LANES,), LOWEST, tl.float32)
        base_t = base_s
        sum_1 = tl.zeros((LANES,), tl.float32)
        sum_s, sum_t, gaps = sum_1, sum_1, sum_1
        for step in range(0, full):
            at = _tile(step, BLOCK, GROUP, ALIGNED)
            base_s, base_t, sum_1, sum_s, sum_t, gaps = _add(
                at, s_row, t_row, V, scale, base_s, base_t, sum_1, sum_s, sum_t, gaps,
                o, SQUARINGS, False,
            )  # fmt: skip
        if rest:
            at = _tile(full, BLOCK, GROUP, ALIGNED)
            base_s, base_t, sum_1, sum_s, sum_t, gaps = _add(
                at, s_row, t_row, V, scale, base_s, base_t, sum_1, sum_s, sum_t, gaps,
                o, SQUARINGS, True,
            )  # fmt: skip
        base_s, base_t, sum_1, sum_s, sum_t, gaps = _joined(
            base_s, base_t, sum_1, sum_s, sum_t, gaps, scale, o, SQUARINGS
        )
        if not (o.ce and o.divergence and SQUARINGS != 0):
            sum_1 = sum_s

        value = 0.0
        if o.loss:
            if o.divergence:
                value = gaps / sum_t * inverse + tl.log(sum_s)
                good = value < INFINITY
                if o.kind != CROSS_ENTROPY:
                    value -= tl.log(sum_t)
                    good = (value >= SMALL) & (value < INFINITY)
                if not good:
                    terms = tl.zeros((LANES,), tl.float32)
                    for step in range(0, tl.cdiv(V, BLOCK)):
                        at = _tile(step, BLOCK, GROUP, ALIGNED)
                        terms += tl.sum(_terms(at, s_row, t_row, V, scale, inverse, base_s, base_t, sum_s, sum_t, o), 1)
                    value = tl.sum(terms, 0)
                value *= kd
            if o.ce:
                value += ce * (tl.log(sum_1) - (s_label - base_s))

        if o.grad:
            of_1 = row_weight * ce / sum_1
            of_s = of_1
            of_t = 0.0
            if o.divergence:
                of_t = row_weight * kd / (temperature * sum_t)
                of_s = row_weight * kd / (temperature * sum_s)
                if o.ce and SQUARINGS == 0:
                    of_s += of_1
            if rest:
                at = _tile(full, BLOCK, GROUP, ALIGNED)
                g = _gradient_tile(
                    at, s_row, t_row, V, scale, base_s, base_t, of_1, of_s, of_t, o, SQUARINGS, True
                )  # fmt: skip
                tl.store(grad_row + at, g.to(grad.dtype.element_ty), mask=at < V)
            for step in range(0, full):
                at = _tile(full - 1 - step, BLOCK, GROUP, ALIGNED)
                g = _gradient_tile(
                    at, s_row, t_row, V, scale, base_s, base_t, of_1, of_s, of_t, o, SQUARINGS, False
                )  # fmt: skip
                tl.store(grad_row + at, g.to(grad.dtype.element_ty))
            if o.ce:
                # Another thread may have stored the label's element: after that.
                tl.debug_barrier()
                g = _gradient(s_label, t_label, scale, base_s, base_t, of_1, of_s, of_t, o, SQUARINGS)
                g -= row_weight * ce
                tl.store(grad_row + label, g.to(grad.dtype.element_ty), mask=legal)
        if o.loss:  # after the gradient: rows of one block are read once only if no store lies between
            tl.store(loss + row, row_weight * value)
