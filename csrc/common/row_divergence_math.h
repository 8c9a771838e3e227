// The mathematics of one row of row_divergence, shared by the CPU and the CUDA kernels; the definition is in
// kdaif_fast/reference/row_terms.py, the derivation in docs/method.md, section 5.
//
// X is what one arithmetic instruction works on: a number in a CUDA thread, a vector of numbers on the CPU. It brings
// select(condition, a, b), log_of, exp_of and abs_of. F is the number type.
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

// The settings of one row; names as in the reference.
template <class F>
struct RowSettings {
  F temperature, ce, kd, other, label_mix, interpolation, gate;
};

template <class F> KDAIF_SHARED F select(bool condition, F a, F b) { return condition ? a : b; }
KDAIF_SHARED float log_of(float x) { return std::log(x); }
KDAIF_SHARED double log_of(double x) { return std::log(x); }
KDAIF_SHARED float exp_of(float x) { return std::exp(x); }
KDAIF_SHARED double exp_of(double x) { return std::exp(x); }
KDAIF_SHARED float abs_of(float x) { return std::fabs(x); }
KDAIF_SHARED double abs_of(double x) { return std::fabs(x); }

KDAIF_SHARED bool is_between_logits(int kind) { return kind == LOGIT_MSE || kind == LOG_COSH; }

// One class's share of a divergence, and its derivatives with respect to log q (between logits: with respect to what
// log_q holds). `convex` is the curvature that the Gauss-Newton product keeps, `forward` what it keeps of the first
// derivative: that of the terms linear in log q.
template <class X>
struct Term {
  X value, first, second;
};

// a log(a / b), 0 where a is 0.
template <class X> KDAIF_SHARED X excess(X a, X log_a, X log_b) { return select(a > X(0) * a, a * (log_a - log_b), a); }

// Terms that sum to KL(a || b). Of normalised distributions a log(a / b) + b - a: no such term is negative, and where a
// and b are nearly equal its series does without their difference. (`apart` is log(a / b).)
template <class F, class X>
KDAIF_SHARED X divergence(X a, X log_a, X b, X log_b, bool normalised) {
  const X apart = log_a - log_b;
  if (!normalised) return select(a > X(0) * a, a * apart, a);
  // exp(-x) - 1 + x = x^2 (1/2 - x/6 + x^2/24 - ...)
  constexpr F near = sizeof(F) == 8 ? F(0.02) : F(0.25);
  const X x = apart;
  X series = x * F(-1.0 / 40320) + F(1.0 / 5040);
  series = series * x * F(-1) + F(1.0 / 720) ;
  return series;
}

}  // namespace kdaif
