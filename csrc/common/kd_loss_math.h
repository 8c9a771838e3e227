// The mathematics of one row of kd_loss, shared by the CPU and the CUDA kernels.
//
//   loss = alpha CE(y, s) + (1 - alpha) T^2 KL(softmax(t / T) || softmax(s / T))        (docs/method.md, equation 4)
//
// A kernel only has to form the row's maxima and sums; everything after that is here.
#pragma once
#include <cmath>

#include "common/shared.h"

namespace kdaif {

// Sums over one row, of exponentials relative to the row's maximum: every exponent is <= 0, so nothing overflows.
template <class F>
struct KdSums {
  F student_1 = 0;  // sum exp(s - max s)
  F student_T = 0;  // sum exp((s - max s) / T)
  F teacher_T = 0;  // sum exp((t - max t) / T)
  F cross = 0;      // sum exp((t - max t) / T) * ((t - max t) - (s - max s)) / T
};

// What multiplies the row's exponentials in its gradient; the label column gets -alpha on top.
template <class F>
struct KdGradFactors {
  F student_1, student_T, teacher_T;
};

// label_logit is s_y - max s. A part with weight 0 is left out, so that its infinities cannot turn into NaN.
template <class F>
KDAIF_SHARED F kd_row_loss(const KdSums<F>& sums, F label_logit, F T, F alpha) {
  F loss = 0;
  if (alpha != 0) loss += alpha * (std::log(sums.student_1) - label_logit);
  if (alpha != 1) {
    const F kl = sums.cross / sums.teacher_T - std::log(sums.teacher_T) + std::log(sums.student_T);
    // Rounding can put the divergence of equal distributions a hair below zero; NaN must stay NaN.
    loss += (1 - alpha) * T * T * (kl < 0 ? F(0) : kl);
  }
  return loss;
}

template <class F>
KDAIF_SHARED KdGradFactors<F> kd_row_grad_factors(const KdSums<F>& sums, F scale, F T, F alpha) {
  return {alpha == 0 ? F(0) : scale * alpha / sums.student_1,
          alpha == 1 ? F(0) : scale * (1 - alpha) * T / sums.student_T,
          alpha == 1 ? F(0) : scale * (1 - alpha) * T / sums.teacher_T};
}

// The row's Hessian times u is, with p = softmax(s) and q = softmax(s / T),
//   alpha (p * u - p <p, u>) + (1 - alpha) (q * u - q <q, u>) :
// T cancels, and neither teacher nor label appear.
template <class F>
struct KdHvpSums {
  F student_1 = 0, student_T = 0;    // as in KdSums
  F tangent_1 = 0, tangent_T = 0;    // sum exp(s - max s) u  and  sum exp((s - max s) / T) u
};

template <class F>
struct KdHvpFactors {
  F student_1, student_T;  // what multiplies exp(.) * (u - mean)
  F mean_1, mean_T;        // <p, u> and <q, u>
};

template <class F>
KDAIF_SHARED KdHvpFactors<F> kd_row_hvp_factors(const KdHvpSums<F>& sums, F scale, F alpha) {
  return {alpha == 0 ? F(0) : scale * alpha / sums.student_1,
          alpha == 1 ? F(0) : scale * (1 - alpha) / sums.student_T,
          alpha == 0 ? F(0) : sums.tangent_1 / sums.student_1,
          alpha == 1 ? F(0) : sums.tangent_T / sums.student_T};
}

}  // namespace kdaif
