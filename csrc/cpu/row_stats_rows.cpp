// row_stats over rows; compiled once per instruction set (KDAIF_LEVEL), so nothing here may have external linkage but
// the function at the end, and no library template may be instantiated.
//
// Floor: 2 reads of V elements, in memory's time; but what is paid for is two exponentials a class. Everything else of
// the one pass that forms them (entropy, both divergences, the slice's mass) shares them. The maxima come from a pass
// before it, which also brings the row into the L1/L2 cache.
#include "cpu/row_stats_rows.h"

#include "common/row_stats_math.h"
#include "cpu/simd.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// NaN if the range has one: then the row's sums, and with them all of its statistics, are NaN too.
template <class F, class T> KDAIF_INLINE F range_max(const T* x, int64_t begin, int64_t end) {
  F m = -F(INFINITY);
  int unordered = 0;
#pragma omp simd reduction(max : m) reduction(| : unordered)
  for (int64_t v = begin; v < end; ++v) {
    const F value = widen(x[v]);
    m = value > m ? value : m;
    unordered |= value != value;
  }
  return unordered ? F(NAN) : m;
}

// The lowest index of `m`, the row's maximum; of the first NaN if m is NaN. Looks at whole blocks first: a loop with a
// way out is not made into vector code.
template <class F, class T> KDAIF_INLINE int64_t first_index(const T* x, F m, int64_t V) {
  constexpr int64_t BLOCK = 64;
  int64_t block = 0;
  for (; block + BLOCK < V; block += BLOCK) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t v = block; v < block + BLOCK; ++v) {
      const F value = widen(x[v]);
      found |= (value == m) | (value != value);
    }
    if (found) break;
  }
  for (int64_t v = block; v < V; ++v) {
    const F value = widen(x[v]);
    if (value == m || value != value) return v;
  }
  return 0;
}

// Sums over both rows; exponents and what is weighted by e are in powers of 2 until `finish`.
template <class F>
struct PairSums {
  F student = 0, teacher = 0;                // sum e
  F student_mean = 0, teacher_mean = 0;      // sum e x
  F student_mass = 0, teacher_mass = 0;      // sum e over the class slice
  F forward = 0, reverse = 0;                // sum e_t (x_t - x_s), sum e_s (x_s - x_t)
};

template <bool TEACHER, class T, class F>
KDAIF_INLINE void add_range(const T* s, const T* t, F max_s, F max_t, F to_log2, int64_t begin, int64_t end, PairSums<F>& sums) {
  F student = 0, teacher = 0, student_mean = 0, teacher_mean = 0, forward = 0, reverse = 0;
#pragma omp simd reduction(+ : student, teacher, student_mean, teacher_mean, forward, reverse)
  for (int64_t v = begin; v < end; ++v) {
    const F log_q = (widen(s[v]) - max_s) * to_log2, q = exp2_nonpositive(log_q);
    student += q;
    // A class without probability contributes nothing, even where its logit is -inf.
    student_mean += q > 0 ? q * log_q : q;
    if constexpr (TEACHER) {
      const F log_p = (widen(t[v]) - max_t) * to_log2, p = exp2_nonpositive(log_p), apart = log_p - log_q;
      teacher += p;
      teacher_mean += p > 0 ? p * log_p : p;
      forward += p > 0 ? p * apart : p;
      reverse -= q > 0 ? q * apart : q;
    }
  }
  sums.student += student, sums.teacher += teacher;
  sums.student_mean += student_mean, sums.teacher_mean += teacher_mean;
  sums.forward += forward, sums.reverse += reverse;
}

template <bool TEACHER, class T, class F>
KDAIF_INLINE PairSums<F> sum_rows(const T* s, const T* t, F max_s, F max_t, const RowStatsRows& rows) {
  const F to_log2 = F(LOG2_E / rows.temperature);
  const int64_t first = rows.first_class, last = first + rows.class_count;
  PairSums<F> sums, slice;
  if (rows.class_count > 0) add_range<TEACHER>(s, t, max_s, max_t, to_log2, first, last, slice);
  sums = slice;
  sums.student_mass = slice.student, sums.teacher_mass = slice.teacher;
  add_range<TEACHER>(s, t, max_s, max_t, to_log2, 0, first, sums);
  add_range<TEACHER>(s, t, max_s, max_t, to_log2, last, rows.classes, sums);
  // A row without a softmax has to be seen here: exp2_nonpositive may make a number of a NaN.
  if (max_s - max_s != 0) sums.student = F(NAN);
  if (max_t - max_t != 0) sums.teacher = F(NAN);
  return sums;
}

// The largest logit of the classes other than `of`: the row's maximum unless that is what `of` has.
template <class F, class T> KDAIF_INLINE F largest_other(const T* x, F largest, int64_t of, int64_t V) {
  if (F(widen(x[of])) != largest) return largest;
  const F before = range_max<F>(x, 0, of), after = range_max<F>(x, of + 1, V);
  return before > after ? before : after;
}

// One network's statistics; returns its arg-max.
template <class T, class F>
KDAIF_INLINE int64_t write_side(const T* x, F largest, const StatSums<F>& sums, const RowStatsRows& rows, int64_t row, F* out) {
  const int64_t V = rows.classes, argmax = first_index(x, largest, V);
  const bool labels = rows.labels != nullptr, known = labels && rows.labels[row] != rows.ignore_index;
  const int64_t of = known ? rows.labels[row] : argmax;
  const StatLogits<F> logits{largest, widen(x[of]), largest_other(x, largest, of, V)};
  write_stats(sums, logits, F(rows.temperature), {labels, known, rows.class_count > 0}, out + row, rows.rows);
  return argmax;
}

template <class T, bool TEACHER>
void stats_rows(const RowStatsRows& rows, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const F ln2 = F(LN_2);
  const int64_t N = rows.rows;
  F* out = static_cast<F*>(rows.stats);
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(rows.student) + i * rows.student_stride;
    const T* t = TEACHER ? static_cast<const T*>(rows.teacher) + i * rows.teacher_stride : s;
    const F max_s = range_max<F>(s, 0, rows.classes), max_t = TEACHER ? range_max<F>(t, 0, rows.classes) : max_s;
    const auto sums = sum_rows<TEACHER>(s, t, max_s, max_t, rows);
    rows.argmax[i] = write_side(s, max_s, {sums.student, sums.student_mean * ln2, sums.student_mass}, rows, i, out);
    if constexpr (TEACHER) {
      const StatSums<F> teacher{sums.teacher, sums.teacher_mean * ln2, sums.teacher_mass};
      rows.argmax[N + i] = write_side(t, max_t, teacher, rows, i, out + STATS_ALONE * N);
      out[STAT_FORWARD_KL * N + i] = stat_divergence(sums.forward * ln2, sums.teacher, sums.student);
      out[STAT_REVERSE_KL * N + i] = stat_divergence(sums.reverse * ln2, sums.student, sums.teacher);
    }
  }
}

template <class T> KDAIF_INLINE void stats_rows_of(const RowStatsRows& rows, int64_t begin, int64_t end) {
  if (rows.teacher != nullptr) stats_rows<T, true>(rows, begin, end);
  else stats_rows<T, false>(rows, begin, end);
}

}  // namespace

void row_stats_rows(const RowStatsRows& rows, ElementType type, int64_t begin, int64_t end) {
  switch (type) {
    case ElementType::float32: stats_rows_of<float>(rows, begin, end); break;
    case ElementType::float64: stats_rows_of<double>(rows, begin, end); break;
    case ElementType::bfloat16: stats_rows_of<bfloat16>(rows, begin, end); break;
    case ElementType::float16: stats_rows_of<float16>(rows, begin, end); break;
  }
}

}  // namespace kdaif::KDAIF_LEVEL
