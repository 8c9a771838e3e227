// Cross-entropy with labels and forward KL from teacher logits over all classes: what most people train with, and the
// loops that have to be fast.
//
// Floor: 2 reads and 1 write of V elements, but exponentials are what is paid for: one per element for cross-entropy
// alone, two for KL alone, and two or three for both (the student's exp(s) is a power of exp(s / T) for the usual T). A
// vector of 16 floats takes about 9 instructions for each exponential and 15 for the rest. Loss and gradient in one pass
// keep the exponentials in the L1/L2 cache instead of forming them twice. `make bench` measures it
// (benchmarks/bench_row_divergence.py).
#pragma once
#include "common/row_divergence_args.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// Sums over a row of exponentials relative to its maximum: every exponent is <= 0, so nothing overflows.
constexpr int STUDENT_1 = 0;  // sum exp(s - max s)
constexpr int STUDENT_T = 1;  // sum exp((s - max s) / T)
constexpr int TEACHER_T = 2;  // sum exp((t - max t) / T)
constexpr int CROSS = 3;      // sum exp((t - max t) / T) * ((t - max t) - (s - max s)) / T, in units of log 2

template <class F, class T> KDAIF_INLINE F row_max(const T* x, int64_t V) {
  Vec<F> largest = all(-F(INFINITY));
  for_vectors_of<F, T>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
    largest = max_of(part.get(x + v, -F(INFINITY)), largest);
  });
  return largest_of(largest);
}

template <int POWER, class X> KDAIF_INLINE X integer_power(X x) {
  if constexpr (POWER == 1) return x;
  else if constexpr (POWER % 2 == 0) return integer_power<POWER / 2>(x * x);
  else return x * integer_power<POWER - 1>(x);
}

// Where the exponentials of a row are kept for its gradient, in the order of for_vectors_of.
template <class F>
struct Exponentials {
  F *student, *teacher, *student_1;  // exp(s / T), or exp(s) without KL; exp(t / T); exp(s) if it is no power of the first
};

// POWER is T where T is a small integer, so that exp(s) = exp(s / T)^T; 0 otherwise.
template <bool CE, bool KL, int POWER, bool KEEP, class F, class T>
KDAIF_INLINE Four<F> sum_row(const T* s, const T* t, F max_s, F max_t, F temperature, int64_t V, Exponentials<F> keep) {
  constexpr bool COARSE = sizeof(T) == 2;
  const F to_log2 = F(LOG2_E), to_log2_T = F(LOG2_E / double(temperature));
  Four<F> total{};
  // Summed in blocks: a sum's rounding grows with the number of its terms.
  constexpr int64_t BLOCK = 16 * LANES<F>;
  for (int64_t block = 0; block < V; block += BLOCK) {
    Vec<F> student_1{}, student_T{}, teacher_T{}, cross{};
    const int64_t count = V - block < BLOCK ? V - block : BLOCK;
    for_vectors_of<F, T>(count, [&](int64_t at, auto part) __attribute__((always_inline)) {
      const int64_t v = block + at;
      const Vec<F> x = part.get(s + v, -F(INFINITY)) - max_s;
      if constexpr (KL) {
        const Vec<F> log_q = x * to_log2_T, log_p = (part.get(t + v, -F(INFINITY)) - max_t) * to_log2_T;
        const Vec<F> q = exp2_of<COARSE>(log_q), p = exp2_of<COARSE>(log_p);
        student_T += q;
        teacher_T += p;
        // A class that the teacher excludes contributes nothing, even where the student excludes it too.
        cross += select(p > F(0), p * (log_p - log_q), p);
        if constexpr (KEEP) store(q, keep.student + v), store(p, keep.teacher + v);
        if constexpr (CE && POWER != 0) student_1 += integer_power<POWER>(q);
      }
      if constexpr (CE && (!KL || POWER == 0)) {
        const Vec<F> e = exp2_of<COARSE>(x * to_log2);
        student_1 += e;
        if constexpr (KEEP) store(e, (KL ? keep.student_1 : keep.student) + v);
      }
    });
    total += sums_of(student_1, student_T, teacher_T, cross);
  }
  return total;
}

// KL of nearly equal distributions, term by term: none is negative, and none is a difference of large numbers.
template <class F, class T>
__attribute__((noinline)) F small_kl(const T* s, const T* t, F max_s, F max_t, F temperature, int64_t V, F q_scale, F p_scale, F log_ratio) {
  Vec<F> sum{};
  const F inverse = 1 / temperature;
  for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> log_q = (part.get(s + v, -F(INFINITY)) - max_s) * inverse - log_ratio;
    const Vec<F> log_p = (part.get(t + v, -F(INFINITY)) - max_t) * inverse;
    const Vec<F> p = exp_of(log_p) * p_scale, q = exp_of((part.get(s + v, -F(INFINITY)) - max_s) * inverse) * q_scale;
    sum += divergence<F>(p, log_p, q, log_q, true);
  });
  return sum_of(sum);
}

constexpr double SMALL_KL = 1.0 / 64;  // below this, the difference of sums has lost too many digits

template <bool CE, bool KL, int POWER, class F, class T>
KDAIF_INLINE void grad_row(T* grad, F one, F student, F teacher, int64_t V, Exponentials<F> kept) {
  store_vectors<F>(grad, V, [&](int64_t v) __attribute__((always_inline)) {
    const Vec<F> e = load(kept.student + v);
    Vec<F> g;
    if constexpr (KL) g = student * e - teacher * load(kept.teacher + v);
    if constexpr (CE && KL && POWER != 0) g += one * integer_power<POWER>(e);
    if constexpr (CE && KL && POWER == 0) g += one * load(kept.student_1 + v);
    if constexpr (CE && !KL) g = one * e;
    return g;
  });
}

// One row; loss may be null. `scale` multiplies loss and gradient.
template <class T, bool CE, bool KL, int POWER, bool GRAD, class F>
void plain_row(const T* s, const T* t, int64_t V, int64_t label, F scale, const RowSettings<F>& r, F* loss, T* grad,
               Exponentials<F> keep) {
  const F max_s = row_max<F>(s, V), max_t = KL ? row_max<F>(t, V) : max_s, temperature = r.temperature;
  const Four<F> sums = sum_row<CE, KL, POWER, GRAD>(s, t, max_s, max_t, temperature, V, keep), inverse = F(1) / sums;
  if (loss != nullptr) {
    const Four<F> logs = log_of_four(Four<F>{sums[STUDENT_1], sums[STUDENT_T] * inverse[TEACHER_T], F(1), F(1)});
    F value = 0;
    if constexpr (CE) value += r.ce * (logs[0] - (widen(s[label]) - max_s));
    if constexpr (KL) {
      F kl = sums[CROSS] * F(LN_2) * inverse[TEACHER_T] + logs[1];
      if (kl < F(SMALL_KL))
        kl = small_kl<F>(s, t, max_s, max_t, temperature, V, inverse[STUDENT_T], inverse[TEACHER_T], logs[1]);
      value += r.kd * kl;
    }
    *loss = scale * value;
  }
  if constexpr (GRAD) {
    const F one = CE ? scale * r.ce * inverse[STUDENT_1] : F(0), kd = KL ? scale * r.kd / temperature : F(0);
    const F student = KL ? kd * inverse[STUDENT_T] : F(0), teacher = KL ? kd * inverse[TEACHER_T] : F(0);
    grad_row<CE, KL, POWER>(grad, one, student, teacher, V, keep);
    if constexpr (CE) {  // from the exponentials again: a narrow gradient is not to be rounded twice
      const int64_t at = place<T>(label, V);
      const F e = keep.student[at];
      F g = -scale * r.ce + (KL ? student * e - teacher * keep.teacher[at] : one * e);
      if constexpr (KL && POWER != 0) g += one * integer_power<POWER>(e);
      if constexpr (KL && POWER == 0) g += one * keep.student_1[at];
      kdaif::narrow(g, grad[label]);
    }
  }
}

// The specialisation that a row's settings ask for.
template <class T, bool GRAD, class F>
void any_plain_row(const T* s, const T* t, int64_t V, int64_t label, F scale, const RowSettings<F>& r, F* loss, T* grad,
                   Exponentials<F> keep) {
  const auto run = [&]<bool CE, bool KL, int POWER>() {
    plain_row<T, CE, KL, POWER, GRAD>(s, t, V, label, scale, r, loss, grad, keep);
  };
  const F T_ = r.temperature;
  if (r.kd == 0) run.template operator()<true, false, 0>();
  else if (r.ce == 0) run.template operator()<false, true, 0>();
  else if (T_ == 1) run.template operator()<true, true, 1>();
  else if (T_ == 2) run.template operator()<true, true, 2>();
  else if (T_ == 3) run.template operator()<true, true, 3>();
  else if (T_ == 4) run.template operator()<true, true, 4>();
  else run.template operator()<true, true, 0>();
}

// What can be asked of all rows at once; `other` and `interpolation` may still differ by row.
inline bool is_plain(const RowDivergence& d) {
  const bool whole = d.teacher == nullptr || (d.form == LOGITS && d.first_class == 0 && d.class_count == d.V);
  return d.kind == KL && whole && !d.mixes && !d.exclude_label && d.second == nullptr && d.mask == nullptr &&
         d.class_weight == nullptr && d.soft_labels == nullptr && d.smoothing == 0;
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
