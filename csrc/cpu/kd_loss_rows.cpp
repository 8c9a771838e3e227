// kd_loss over rows; compiled once per instruction set (KDAIF_LEVEL), so nothing here may have external linkage but
// the two functions at the end, and no library template may be instantiated.
//
// Floor and cost, float32: 2 reads and 1 write of V elements, but exponentials are what is paid for: one per element
// for CE alone, two for KL alone, and two or three for both (the student's exp(s) is a power of exp(s / T) for the
// usual T). Forward and gradient in one pass keep the row's exponentials in the L1/L2 cache instead of forming them
// twice. `make bench` measures it against eager PyTorch and torch.compile.
#include "cpu/kd_loss_rows.h"

#include <cstdlib>

#include "common/kd_loss_math.h"
#include "cpu/simd.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// One thread's working memory: `count` rows of `classes` elements, each starting on a cache line.
template <class F>
class Scratch {
 public:
  Scratch(int64_t count, int64_t classes)
      : stride_((classes * int64_t(sizeof(F)) + 63) / 64 * 64),
        memory_(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(count * stride_ + 64)))) {}
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  F* row(int64_t i) { return reinterpret_cast<F*>(memory_ + i * stride_); }

 private:
  int64_t stride_;
  char* memory_;
};

// A row as F: the row itself when it already is, else a widened copy in `buffer`.
template <class T, class F> KDAIF_INLINE const F* as_float(const T* row, F* buffer, int64_t V) {
  if constexpr (sizeof(T) == sizeof(F)) {
    return row;
  } else {
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) buffer[v] = widen(row[v]);
    return buffer;
  }
}

// NaN if the row has one: then the row's sums, and with them all of its results, are NaN too.
template <class F> KDAIF_INLINE F row_max(const F* x, int64_t V) {
  F m = -F(INFINITY);
  int unordered = 0;
#pragma omp simd reduction(max : m) reduction(| : unordered)
  for (int64_t v = 0; v < V; ++v) {
    m = x[v] > m ? x[v] : m;
    unordered |= x[v] != x[v];
  }
  return unordered ? F(NAN) : m;
}

template <int POWER, class F> KDAIF_INLINE F integer_power(F x) {
  if constexpr (POWER == 1) return x;
  else if constexpr (POWER % 2 == 0) return integer_power<POWER / 2>(x * x);
  else return x * integer_power<POWER - 1>(x);
}

// POWER is T where T is a small integer, so that exp(s) = exp(s / T)^T; 0 otherwise.
// e_student holds exp(s / T), or exp(s) if there is no KL part.
template <bool CE, bool KL, int POWER, bool KEEP, class F>
KDAIF_INLINE KdSums<F> sum_row(const F* s, const F* t, F max_s, F max_t, F T, int64_t V, F* e_student, F* e_teacher,
                               F* e_student_1) {
  const F to_log2 = F(LOG2_E), to_log2_T = F(LOG2_E / double(T));
  F student_1 = 0, student_T = 0, teacher_T = 0, cross = 0;
#pragma omp simd reduction(+ : student_1, student_T, teacher_T, cross)
  for (int64_t v = 0; v < V; ++v) {
    const F x = s[v] - max_s;
    if constexpr (KL) {
      const F log_q = x * to_log2_T, log_p = (t[v] - max_t) * to_log2_T;
      const F q = exp2_nonpositive(log_q), p = exp2_nonpositive(log_p);
      student_T += q;
      teacher_T += p;
      // A class that the teacher excludes contributes nothing, even where the student excludes it too.
      cross += p > 0 ? p * (log_p - log_q) : p;
      if constexpr (KEEP) e_student[v] = q, e_teacher[v] = p;
      if constexpr (CE && POWER != 0) student_1 += integer_power<POWER>(q);
    }
    if constexpr (CE && (!KL || POWER == 0)) {
      const F e = exp2_nonpositive(x * to_log2);
      student_1 += e;
      if constexpr (KEEP) (KL ? e_student_1 : e_student)[v] = e;
    }
  }
  KdSums<F> sums;
  sums.student_1 = student_1, sums.student_T = student_T, sums.teacher_T = teacher_T, sums.cross = cross * F(LN_2);
  return sums;
}

template <bool CE, bool KL, int POWER, class F>
KDAIF_INLINE void grad_row(F* grad, const KdGradFactors<F>& factors, const F* e_student, const F* e_teacher,
                           const F* e_student_1, int64_t V) {
  const F one = factors.student_1, student = factors.student_T, teacher = factors.teacher_T;
#pragma omp simd
  for (int64_t v = 0; v < V; ++v) {
    F g = 0;
    if constexpr (KL) g = student * e_student[v] - teacher * e_teacher[v];
    if constexpr (CE && KL && POWER != 0) g += one * integer_power<POWER>(e_student[v]);
    if constexpr (CE && KL && POWER == 0) g += one * e_student_1[v];
    if constexpr (CE && !KL) g = one * e_student[v];
    grad[v] = g;
  }
}

// A result is formed where it belongs if it has type F, else in `buffer`, from where store_row narrows it.
template <class T, class F> KDAIF_INLINE F* result_row(T* out, F* buffer) {
  if constexpr (sizeof(T) == sizeof(F)) return out;
  else return buffer;
}
template <class T, class F> KDAIF_INLINE void store_row(const F* row, T* out, int64_t V) {
  if constexpr (sizeof(T) != sizeof(F)) {
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) narrow(row[v], out[v]);
  }
}

template <class T, bool CE, bool KL, int POWER, bool GRAD>
void loss_rows(const KdLossRows& rows, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  constexpr bool WIDE = sizeof(T) == sizeof(F);
  const int64_t V = rows.classes;
  const F temperature = F(rows.temperature), alpha = F(rows.alpha);
  Scratch<F> scratch((GRAD ? 3 : 0) + (WIDE ? 0 : 2), V);
  F *e_student = scratch.row(0), *e_teacher = scratch.row(GRAD ? 1 : 0), *e_student_1 = scratch.row(GRAD ? 2 : 0);
  F *wide_s = scratch.row(GRAD ? 3 : 0), *wide_t = scratch.row((GRAD ? 3 : 0) + (WIDE ? 0 : 1));
  for (int64_t i = begin; i < end; ++i) {
    const F* s = as_float(static_cast<const T*>(rows.student) + i * rows.student_stride, wide_s, V);
    const F* t = KL ? as_float(static_cast<const T*>(rows.teacher) + i * rows.teacher_stride, wide_t, V) : s;
    const F max_s = row_max(s, V), max_t = KL ? row_max(t, V) : max_s;
    const F scale = static_cast<const F*>(rows.scale)[i], label_logit = s[rows.labels[i]] - max_s;
    const auto sums = sum_row<CE, KL, POWER, GRAD>(s, t, max_s, max_t, temperature, V, e_student, e_teacher, e_student_1);
    if (rows.loss) static_cast<F*>(rows.loss)[i] = scale * kd_row_loss(sums, label_logit, temperature, alpha);
    if constexpr (GRAD) {
      T* out = static_cast<T*>(rows.grad) + i * V;
      F* grad = result_row(out, wide_s);
      grad_row<CE, KL, POWER>(grad, kd_row_grad_factors(sums, scale, temperature, alpha), e_student, e_teacher, e_student_1, V);
      grad[rows.labels[i]] -= scale * alpha;
      store_row(grad, out, V);
    }
  }
}

template <bool CE, bool KL, int POWER, class F>
KDAIF_INLINE void hvp_row(const F* s, const F* u, F* out, F* e_student, F* e_student_1, F max_s, F T, F alpha, F scale, int64_t V) {
  const F to_log2 = F(LOG2_E), to_log2_T = F(LOG2_E / double(T));
  F student_1 = 0, student_T = 0, tangent_1 = 0, tangent_T = 0;
#pragma omp simd reduction(+ : student_1, student_T, tangent_1, tangent_T)
  for (int64_t v = 0; v < V; ++v) {
    const F x = s[v] - max_s;
    F e = 0;
    if constexpr (KL) {
      e = exp2_nonpositive(x * to_log2_T);
      e_student[v] = e;
      student_T += e;
      tangent_T += e * u[v];
    }
    if constexpr (CE) {
      if constexpr (KL && POWER != 0) e = integer_power<POWER>(e);
      else e_student_1[v] = e = exp2_nonpositive(x * to_log2);
      student_1 += e;
      tangent_1 += e * u[v];
    }
  }
  KdHvpSums<F> sums;
  sums.student_1 = student_1, sums.student_T = student_T, sums.tangent_1 = tangent_1, sums.tangent_T = tangent_T;
  const auto f = kd_row_hvp_factors(sums, scale, alpha);
#pragma omp simd
  for (int64_t v = 0; v < V; ++v) {
    F h = 0;
    if constexpr (KL) h = f.student_T * e_student[v] * (u[v] - f.mean_T);
    if constexpr (CE && KL && POWER != 0) h += f.student_1 * integer_power<POWER>(e_student[v]) * (u[v] - f.mean_1);
    if constexpr (CE && !(KL && POWER != 0)) h += f.student_1 * e_student_1[v] * (u[v] - f.mean_1);
    out[v] = h;
  }
}

template <class T, bool CE, bool KL, int POWER>
void hvp_rows(const KdLossHvpRows& rows, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  constexpr bool WIDE = sizeof(T) == sizeof(F);
  const int64_t V = rows.classes;
  Scratch<F> scratch(2 + (WIDE ? 0 : 2), V);
  F *wide_s = scratch.row(WIDE ? 0 : 2), *wide_u = scratch.row(WIDE ? 0 : 3);
  for (int64_t i = begin; i < end; ++i) {
    const F* s = as_float(static_cast<const T*>(rows.student) + i * rows.student_stride, wide_s, V);
    const F* u = as_float(static_cast<const T*>(rows.tangent) + i * rows.tangent_stride, wide_u, V);
    T* out = static_cast<T*>(rows.out) + i * V;
    F* hvp = result_row(out, wide_s);
    hvp_row<CE, KL, POWER>(s, u, hvp, scratch.row(0), scratch.row(1), row_max(s, V), F(rows.temperature),
                           F(rows.alpha), static_cast<const F*>(rows.scale)[i], V);
    store_row(hvp, out, V);
  }
}

// Picks the specialisation: which parts have weight, and whether exp(s) is a power of exp(s / T).
template <class Body> KDAIF_INLINE void for_parts(double T, double alpha, Body body) {
  if (alpha == 1) body.template operator()<true, false, 0>();
  else if (alpha == 0) body.template operator()<false, true, 0>();
  else if (T == 1) body.template operator()<true, true, 1>();
  else if (T == 2) body.template operator()<true, true, 2>();
  else if (T == 3) body.template operator()<true, true, 3>();
  else if (T == 4) body.template operator()<true, true, 4>();
  else body.template operator()<true, true, 0>();
}

template <class Body> KDAIF_INLINE void for_type(ElementType type, Body body) {
  switch (type) {
    case ElementType::float32: body(float()); break;
    case ElementType::float64: body(double()); break;
    case ElementType::bfloat16: body(bfloat16()); break;
    case ElementType::float16: body(float16()); break;
  }
}

}  // namespace

void kd_loss_rows(const KdLossRows& rows, ElementType type, int64_t begin, int64_t end) {
  for_type(type, [&](auto element) {
    using T = decltype(element);
    for_parts(rows.temperature, rows.alpha, [&]<bool CE, bool KL, int POWER>() {
      if (rows.grad) loss_rows<T, CE, KL, POWER, true>(rows, begin, end);
      else loss_rows<T, CE, KL, POWER, false>(rows, begin, end);
    });
  });
}

void kd_loss_hvp_rows(const KdLossHvpRows& rows, ElementType type, int64_t begin, int64_t end) {
  // At T = 1 both parts have the same Hessian, so one exponential does.
  const double alpha = rows.temperature == 1 ? 1.0 : rows.alpha;
  KdLossHvpRows same = rows;
  same.alpha = alpha;
  for_type(type, [&](auto element) {
    using T = decltype(element);
    for_parts(rows.temperature, alpha,
              [&]<bool CE, bool KL, int POWER>() { hvp_rows<T, CE, KL, POWER>(same, begin, end); });
  });
}

}  // namespace kdaif::KDAIF_LEVEL
