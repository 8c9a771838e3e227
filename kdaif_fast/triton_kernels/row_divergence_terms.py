"""What row_divergence's Triton kernels are made of: options, accurate functions, and the terms of each divergence.

Formulas as in csrc/common/row_divergence_math.h; the definition is in reference/row_terms.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl

KL = tl.constexpr(0)
CROSS_ENTROPY = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)
SKEW_FORWARD = tl.constexpr(3)
SKEW_REVERSE = tl.constexpr(4)
TOTAL_VARIATION = tl.constexpr(5)
PROBABILITY_MSE = tl.constexpr(6)
LOGIT_MSE = tl.constexpr(7)
LOG_COSH = tl.constexpr(8)
DECOUPLED = tl.constexpr(9)
SWAPPED_CROSS_ENTROPY = tl.constexpr(10)

LOGITS = tl.constexpr(0)
PROBABILITIES = tl.constexpr(1)
TOP_K = tl.constexpr(2)

INFINITY = tl.constexpr(float("inf"))


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is compiled for: what is false here costs nothing there."""

    kind: int
    form: int
    mixes: bool  # the target is a mixture: of two teachers, or with the label
    excludes: bool  # the divergence is conditional on not being the label
    ce: bool  # cross-entropy, D and R may have a weight other than 0
    kd: bool
    other: bool
    second: bool  # there is such a tensor
    labels: bool
    soft: bool
    class_weight: bool
    mask: bool
    weight: bool
    rows: bool
    interpolates: bool  # the student's own logits are part of the target
    smooths: bool
    sliced: bool  # the divergence is not over all classes
    loss: bool = False  # results
    grad: bool = False
    gauss_newton: bool = False

    @property
    def divergence(self) -> bool:
        """There is a divergence at all."""
        return self.kd or self.other

    @property
    def between_logits(self) -> bool:
        """The divergence is one between logits."""
        return self.kind in (LOGIT_MSE.value, LOG_COSH.value)

    @property
    def between_softmaxes(self) -> bool:
        """The divergence is one between distributions."""
        return self.divergence and not self.between_logits

    @property
    def leaves_out(self) -> bool:
        """q and p are conditional on not being the label."""
        return self.excludes or self.kind == DECOUPLED.value

    @property
    def plain(self) -> bool:
        """The target is a softmax of logits and nothing else."""
        return self.form == LOGITS.value and not self.mixes

    @property
    def normalised(self) -> bool:
        """Both distributions sum to 1, and classes have no weights."""
        return not self.class_weight and (self.plain or self.leaves_out)

    @property
    def counts(self) -> bool:
        """The divergence is a mean over the classes that take part."""
        return self.divergence and self.kind in (PROBABILITY_MSE.value, LOGIT_MSE.value)

    @property
    def spreads_label(self) -> bool:
        """The cross-entropy's target is more than one class."""
        return self.ce and (self.soft or self.smooths)

    @property
    def linear(self) -> bool:
        """The terms are linear in log q: their first derivative is the target."""
        forward = self.kind in (KL.value, DECOUPLED.value) and not (self.kind == KL.value and self.other)
        return forward or self.kind == CROSS_ENTROPY.value

    @property
    def mass_known(self) -> bool:
        """The sum of the terms' first derivatives is known from the first pass over the row."""
        simple = self.plain or not (self.mixes or self.second)
        return not self.between_softmaxes or (self.linear and simple and not self.class_weight)

    @property
    def light(self) -> bool:
        """Cross-entropy and a forward divergence of softmaxes, and nothing else that needs registers."""
        extras = (self.second, self.soft, self.class_weight, self.mask, self.rows, self.interpolates, self.smooths)
        return self.linear and self.plain and not any(extras)

    @property
    def common(self) -> bool:
        """Cross-entropy with labels, forward KL or cross-entropy with logits: row_divergence_light.py has it."""
        forward = self.plain and self.kind in (KL.value, CROSS_ENTROPY.value) and not self.other
        apart = self.divergence and (not forward or self.excludes or self.sliced or self.mask or self.interpolates)
        others = (self.second, self.soft, self.class_weight, self.rows, self.smooths)
        return (self.ce or self.divergence) and not apart and not any(others)

    @property
    def sums_given(self) -> bool:
        """The first pass sums the given probabilities."""
        return self.between_softmaxes and self.form != LOGITS.value and (self.leaves_out or self.mass_known)

    @property
    def product_reads_target(self) -> bool:
        """Curvature products need the target class by class."""
        return self.divergence and not (self.linear and self.mass_known)

    @property
    def product_sums_target(self) -> bool:
        """Curvature products need the sums of the target's exponentials."""
        return self.product_reads_target or self.kind == DECOUPLED.value


class Settings(NamedTuple):
    """Numbers of one row; names as in the reference."""

    inverse: Any  # 1 / temperature
    ce: Any
    kd: Any
    other: Any
    label_mix: Any
    interpolation: Any
    gate: Any
    smoothing: Any
    skew: Any


class Term(NamedTuple):
    """A class's share of a divergence and its derivatives; `forward` is the part of -first that is linear in log q."""

    value: Any
    first: Any
    second: Any
    forward: Any


@triton.jit
def times(weight, value):
    """weight * value, 0 where weight is 0, whatever the value's infinities."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def log1p(y):
    """log(1 + y) for y in [0, 1], by the series of 2 atanh(y / (2 + y)): tl.log near 1 has an absolute error only."""
    z = y / (2.0 + y)
    square = z * z
    series = 1.0 / 13 + square * (1.0 / 15)
    series = 1.0 / 11 + square * series
    series = 1.0 / 9 + square * series
    series = 1.0 / 7 + square * series
    series = 1.0 / 5 + square * series
    series = 1.0 / 3 + square * series
    return 2.0 * z * (1.0 + square * series)


@triton.jit
def log_sigmoid(a, b):
    """log(exp(a) / (exp(a) + exp(b))), -inf where both are -inf."""
    gap = b - a
    value = -(tl.where(gap > 0, gap, 0.0) + log1p(tl.exp(-tl.abs(gap))))
    return tl.where((a == -INFINITY) & (b == -INFINITY), -INFINITY, value)


@triton.jit
def log_of(p):
    """log p, -inf at 0 without asking for log(0)."""
    return tl.where(p == 0, -INFINITY, tl.log(tl.where(p == 0, 1.0, p)))


@triton.jit
def log_of_mixture(m):
    """log m, finite where m underflows though what it is mixed from does not; NaN stays NaN."""
    return tl.log(tl.where(m < 1.17549435e-38, 1.17549435e-38, m))


@triton.jit
def excess(a, x):
    """a x, 0 where a is 0; NaN stays NaN."""
    return tl.where(a > 0, a * x, a)


@triton.jit
def divergence(a, x, b, normalised: tl.constexpr):
    """Terms that sum to KL(a || b), where x = log(a / b).

    Of normalised distributions a x + b - a: no such term is negative, and near x = 0 a series does without their
    difference: exp(-x) - 1 + x = x^2 (1/2 - x/6 + x^2/24 - ...).
    """
    if not normalised:
        return excess(a, x)
    else:
        series = x * (1.0 / 40320) - 1.0 / 5040
        series = series * x + 1.0 / 720
        series = series * x - 1.0 / 120
        series = series * x + 1.0 / 24
        series = series * x - 1.0 / 6
        series = series * x + 0.5
        value = tl.where(tl.abs(x) < 0.25, a * x * x * series, a * x + (b - a))
        return tl.where(a > 0, value, a + b)


@triton.jit
def _log_cosh_term(gap, kd):
    half = 0.5 * gap
    size = tl.abs(half)
    square = half * half
    e = tl.exp(-2.0 * size)
    series = square * (31.0 / 14175) - 17.0 / 2520
    series = series * square + 1.0 / 45
    series = series * square - 1.0 / 12
    series = series * square + 0.5
    tanh_series = square * (-17.0 / 315) + 2.0 / 15
    tanh_series = tanh_series * square - 1.0 / 3
    tanh_series = (tanh_series * square + 1.0) * size
    tanh_size = tl.where(size < 0.1, tanh_series, (1.0 - e) / (1.0 + e))
    value = tl.where(size < 0.35, series * square, size + log1p(e) - 0.6931471805599453)
    first = tl.where(half < 0, -tanh_size, tanh_size)
    zero = tl.zeros_like(gap)
    return Term(times(kd, value), kd * 0.5 * first, kd * 0.25 * (1.0 - tanh_size * tanh_size), zero)


@triton.jit
def logit_term(gap, valid, w, inverse_count, o: tl.constexpr):
    """The term of a class between logits (of LOG_COSH: divided by T) that are gap apart; nothing where not valid."""
    gap = tl.where(valid, gap, 0.0)
    if o.kind == LOG_COSH:
        t = _log_cosh_term(gap, w.kd)
        return Term(t.value, t.first, tl.where(valid, t.second, 0.0), t.forward)
    else:
        scale = w.kd * inverse_count
        second = tl.where(valid, 2.0 * scale, 0.0)
        return Term(times(scale, gap * gap), times(scale, 2.0 * gap), second, tl.zeros_like(gap))


@triton.jit
def _kullback_leibler_term(q, p, x, w, o: tl.constexpr):
    value = tl.zeros_like(q)
    forward = tl.zeros_like(q)
    second = tl.zeros_like(q)
    if o.kind == KL and o.kd:
        value = times(w.kd, divergence(p, x, q, o.normalised))
        forward = times(w.kd, p)
    if o.kind == DECOUPLED and o.other:
        value = times(w.other, divergence(p, x, q, o.normalised))
        forward = times(w.other, p)
    first = -forward
    if o.kind == KL and o.other:
        reverse = excess(q, -x)
        value += times(w.other, divergence(q, -x, p, o.normalised))
        first += times(w.other, reverse + q)
        second = times(w.other, reverse + 2.0 * q)
    return Term(value, first, second, forward)


@triton.jit
def _mixture_term(q, log_q, p, log_p, w, o: tl.constexpr):
    rest = 1.0 - w.skew
    share_of_p = rest if o.kind == SKEW_REVERSE else w.skew
    m = share_of_p * p + (1.0 - share_of_p) * q
    log_m = log_of_mixture(m)
    share = tl.where(m > 0, p / tl.where(m > 0, m, 1.0), m)
    if o.kind == JENSEN_SHANNON:
        along = rest * excess(q, log_q - log_m)
        # Each half is a KL term, and what `divergence` adds to one it takes from the other: none is negative.
        value = w.skew * divergence(p, log_p - log_m, m, True) + rest * divergence(q, log_q - log_m, m, True)
        first = along
        second = along + rest * w.skew * q * share
    elif o.kind == SKEW_FORWARD:
        value = excess(p, log_p - log_m)
        first = -rest * q * share
        second = first * w.skew * share
    else:
        value = excess(q, log_q - log_m)
        first = value + q * (rest * share)
        second = first + q * (rest * share) * (rest * share)
    return Term(times(w.kd, value), times(w.kd, first), times(w.kd, second), tl.zeros_like(q))


@triton.jit
def softmax_term(q, log_q, p, log_p, x, w, inverse_count, o: tl.constexpr):
    """The term of a class between distributions, x = log(p / q)."""
    zero = tl.zeros_like(q)
    if o.kind == KL or o.kind == DECOUPLED:
        return _kullback_leibler_term(q, p, x, w, o)
    elif o.kind == CROSS_ENTROPY:
        forward = times(w.kd, p)
        return Term(times(w.kd, tl.where(p > 0, -p * log_q, p)), -forward, zero, forward)
    elif o.kind == SWAPPED_CROSS_ENTROPY:
        cross = times(w.kd, tl.where(q > 0, -q * log_p, q))
        return Term(cross, cross, cross, zero)
    elif o.kind == TOTAL_VARIATION:
        gap = q - p
        first = times(w.kd, 0.5 * tl.where(gap > 0, q, tl.where(gap < 0, -q, gap)))
        return Term(times(w.kd, 0.5 * tl.abs(gap)), first, first, zero)
    elif o.kind == PROBABILITY_MSE:
        gap = q - p
        scale = w.kd * inverse_count
        first = times(scale, 2.0 * gap * q)
        return Term(times(scale, gap * gap), first, first + 2.0 * scale * q * q, zero)
    else:
        return _mixture_term(q, log_q, p, log_p, w, o)
