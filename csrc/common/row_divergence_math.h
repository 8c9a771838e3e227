// The mathematics of one row of row_divergence, shared by the CPU and the CUDA kernels; the definition is in
// kdaif_fast/reference/row_terms.py, the derivation in docs/method.md, section 5.
//
// F is the number type. X is what one instruction works on: a number in a CUDA thread, a vector of numbers on the CPU.
// X brings select(condition, a, b), log_of, exp_of and abs_of.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/shared.h"

namespace kdaif {

enum Kind : int {
  KL, CROSS_ENTROPY, JENSEN_SHANNON, SKEW_FORWARD, SKEW_REVERSE, TOTAL_VARIATION, PROBABILITY_MSE, LOGIT_MSE, LOG_COSH,
  DECOUPLED, SWAPPED_CROSS_ENTROPY
};
enum Form : int { LOGITS, PROBABILITIES, TOP_K };

KDAIF_SHARED constexpr bool is_between_logits(int kind) { return kind == LOGIT_MSE || kind == LOG_COSH; }

KDAIF_SHARED float select(bool condition, float a, float b) { return condition ? a : b; }
KDAIF_SHARED double select(bool condition, double a, double b) { return condition ? a : b; }
KDAIF_SHARED float log_of(float x) { return std::log(x); }
KDAIF_SHARED double log_of(double x) { return std::log(x); }
KDAIF_SHARED float exp_of(float x) { return std::exp(x); }
KDAIF_SHARED double exp_of(double x) { return std::exp(x); }
KDAIF_SHARED float abs_of(float x) { return std::fabs(x); }
KDAIF_SHARED double abs_of(double x) { return std::fabs(x); }

// The settings of one row; names as in the reference.
template <class F>
struct RowSettings {
  F temperature, ce, kd, other, label_mix, interpolation, gate;
};

// What all classes of a row have in common.
template <class F>
struct TermSettings {
  F kd, other;      // weights of the kind's two parts
  F skew;
  F inverse_count;  // 1 / number of classes that take part
  bool normalised;  // both distributions sum to 1 and classes have no weights
};

// One class's share of a divergence, and its derivatives with respect to log q (between logits: with respect to what
// log_q holds). `forward` is the part of -first that is linear in log q: what the Gauss-Newton product keeps of it.
template <class X>
struct Term {
  X value, first, second, forward;
};

// a log(a / b), 0 where a is 0; NaN stays NaN.
template <class F, class X> KDAIF_SHARED X excess(X a, X log_a, X log_b) { return select(a > F(0), a * (log_a - log_b), a); }

// log(m) of a mixture m of a and b, finite where m underflows though a or b does not.
template <class F, class X> KDAIF_SHARED X log_of_mixture(X m) {
  constexpr F tiny = sizeof(F) == 8 ? F(2.2250738585072014e-308) : F(1.17549435e-38);
  return log_of(select(m < tiny, m * F(0) + tiny, m));
}

// Terms that sum to KL(a || b). Of normalised distributions a log(a / b) + b - a: no such term is negative, and where a
// and b are nearly equal, a series does without their difference.
template <class F, class X>
KDAIF_SHARED X divergence(X a, X log_a, X b, X log_b, bool normalised) {
  const X x = log_a - log_b;
  if (!normalised) return select(a > F(0), a * x, a);
  // exp(-x) - 1 + x = x^2 (1/2 - x/6 + x^2/24 - ...)
  constexpr F near = sizeof(F) == 8 ? F(0.02) : F(0.25);
  X series = F(1.0 / 40320) * x - F(1.0 / 5040);
  series = series * x + F(1.0 / 720);
  series = series * x - F(1.0 / 120);
  series = series * x + F(1.0 / 24);
  series = series * x - F(1.0 / 6);
  series = series * x + F(0.5);
  const X value = select(abs_of(x) < near, a * x * x * series, a * x + (b - a));
  return select(a > F(0), value, a + b);
}

template <int kind, class F, class X>
KDAIF_SHARED Term<X> row_term(X q, X log_q, X p, X log_p, const TermSettings<F>& w) {
  const F kd = w.kd, other = w.other, rest = 1 - w.skew;
  const X zero = q * F(0);
  Term<X> t{zero, zero, zero, zero};
  if constexpr (kind == KL || kind == DECOUPLED) {
    const F forward = kind == KL ? kd : other;
    if (forward != 0) {
      t.value = forward * divergence<F>(p, log_p, q, log_q, w.normalised);
      t.forward = forward * p;
      t.first = -t.forward;
    }
    if (kind == KL && other != 0) {
      const X reverse = excess<F>(q, log_q, log_p);
      t.value += other * divergence<F>(q, log_q, p, log_p, w.normalised);
      t.first += other * (reverse + q);
      t.second = other * (reverse + F(2) * q);
    }
  } else if constexpr (kind == CROSS_ENTROPY) {
    t.value = kd * select(p > F(0), -p * log_q, p);
    t.forward = kd * p;
    t.first = -t.forward;
  } else if constexpr (kind == SWAPPED_CROSS_ENTROPY) {
    t.value = t.first = t.second = kd * select(q > F(0), -q * log_p, q);
  } else if constexpr (kind == JENSEN_SHANNON) {
    const X m = w.skew * p + rest * q, log_m = log_of_mixture<F>(m), share = select(m > F(0), p / m, m);
    const X along = rest * excess<F>(q, log_q, log_m);
    t.value = kd * (w.skew * excess<F>(p, log_p, log_m) + along);
    t.first = kd * along;
    t.second = kd * (along + rest * w.skew * q * share);
  } else if constexpr (kind == SKEW_FORWARD) {
    const X m = w.skew * p + rest * q, share = select(m > F(0), p / m, m);
    t.value = kd * excess<F>(p, log_p, log_of_mixture<F>(m));
    t.first = -kd * rest * q * share;
    t.second = t.first * w.skew * share;
  } else if constexpr (kind == SKEW_REVERSE) {
    const X m = w.skew * q + rest * p, share = select(m > F(0), rest * p / m, m);
    const X value = excess<F>(q, log_q, log_of_mixture<F>(m));
    t.value = kd * value;
    t.first = kd * (value + q * share);
    t.second = kd * (value + q * share + q * share * share);
  } else if constexpr (kind == TOTAL_VARIATION) {
    const X gap = q - p;
    t.value = kd * F(0.5) * abs_of(gap);
    t.first = kd * F(0.5) * select(gap > F(0), q, select(gap < F(0), -q, gap));
    t.second = t.first;
  } else if constexpr (kind == PROBABILITY_MSE) {
    const X gap = q - p;
    const F scale = kd * w.inverse_count;
    t.value = scale * gap * gap;
    t.first = F(2) * scale * gap * q;
    t.second = t.first + F(2) * scale * q * q;
  } else if constexpr (kind == LOGIT_MSE) {
    const X gap = log_q - log_p;
    const F scale = kd * w.inverse_count;
    t.value = scale * gap * gap;
    t.first = F(2) * scale * gap;
    t.second = F(2) * scale + zero;
  } else if constexpr (kind == LOG_COSH) {
    const X half = F(0.5) * (log_q - log_p), size = abs_of(half), e = exp_of(F(-2) * size);
    const X tanh_size = (F(1) - e) / (F(1) + e), square = half * half;
    constexpr F near = sizeof(F) == 8 ? F(0.02) : F(0.35);
    X series = F(31.0 / 14175) * square - F(17.0 / 2520);
    series = series * square + F(1.0 / 45);
    series = series * square - F(1.0 / 12);
    series = series * square + F(0.5);
    X tanh_series = F(-17.0 / 315) * square + F(2.0 / 15);
    tanh_series = tanh_series * square - F(1.0 / 3);
    tanh_series = (tanh_series * square + F(1)) * size;
    constexpr F tanh_near = sizeof(F) == 8 ? F(0.002) : F(0.1);
    const X tanh_half = select(size < tanh_near, tanh_series, tanh_size);
    t.value = kd * select(size < near, series * square, size + log_of(F(1) + e) - F(0.6931471805599453));
    t.first = kd * F(0.5) * select(half < F(0), -tanh_half, tanh_half);
    t.second = kd * F(0.25) * (F(1) - tanh_half * tanh_half);
  }
  return t;
}

// The two ways to multiply by a row's curvature: `second` and `mass` (the sum of `first`, with its sign turned) as they
// are give the Hessian; for Gauss-Newton the softmax's own curvature counts only where the term is linear in log q.
template <int kind, class X>
KDAIF_SHARED X kept_curvature(const Term<X>& t, bool gauss_newton) {
  return gauss_newton && !is_between_logits(kind) ? t.second - t.first - t.forward : t.second;
}
template <int kind, class X>
KDAIF_SHARED X kept_mass(const Term<X>& t, bool gauss_newton) {
  return gauss_newton ? t.forward : -t.first;
}

// The label's own part of the DECOUPLED divergence: KL between (p_y, p_rest) and (q_y, q_rest).
template <class F>
struct LabelPart {
  F p_y = 0, p_rest = 0, log_q_y = 0, log_q_rest = 0;
};

template <class F>
KDAIF_SHARED F label_part_value(const LabelPart<F>& l) {
  return excess<F>(l.p_y, F(log_of(l.p_y)), l.log_q_y) + excess<F>(l.p_rest, F(log_of(l.p_rest)), l.log_q_rest);
}

// The same where p_y and p_rest sum to 1 and their logarithms were formed just as those of q: never negative, and
// accurate where p and q are nearly equal.
template <class F>
KDAIF_SHARED F label_part_divergence(const LabelPart<F>& l, F log_p_y, F log_p_rest) {
  return divergence<F>(l.p_y, log_p_y, F(exp_of(l.log_q_y)), l.log_q_y, true) +
         divergence<F>(l.p_rest, log_p_rest, F(exp_of(l.log_q_rest)), l.log_q_rest, true);
}

// Its gradient in s / T: `label` at the label, `others` times the conditional q elsewhere.
template <class F>
struct LabelPartGrad {
  F label, others;
};
template <class F>
KDAIF_SHARED LabelPartGrad<F> label_part_grad(const LabelPart<F>& l) {
  const F mass = l.p_y + l.p_rest;
  return {mass * exp_of(l.log_q_y) - l.p_y, mass * exp_of(l.log_q_rest) - l.p_rest};
}

}  // namespace kdaif
