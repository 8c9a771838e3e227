// row_stats over rows; compiled once per instruction set (KDAIF_LEVEL), so nothing here may have external linkage but
// the function at the end, and no library template may be instantiated.
//
// Floor: 2 reads of V elements, but what is paid for is two exponentials a class; all else of the one pass that forms
// them (entropies, both divergences, the slice's mass) shares them. The maxima come from a pass before it, which also
// brings the row into the L1/L2 cache.
//
// Measured against eager PyTorch by `python -m pytest benchmarks/bench_row_stats.py -c benchmarks/pytest.ini`, AVX-512,
// torch 2.13, one thread, medians of one run on a machine that others used too: [4096, 1000] float32 9.1x (torch.compile
// 4.2x), bfloat16 9.2x, float64 4.6x; [512, 100] float32 4.2x. By CPU time, [4096, 1000] float32 takes 3.0 ms: 0.36 ns a
// logit. Small divergences cost a row two more exponentials a class.
#include "cpu/vector.h"

#include "common/row_stats_math.h"
#include "cpu/row_stats_rows.h"

#include "cpu/for_type.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// A NaN is not kept: the sums that follow carry it.
template <class F, class T> KDAIF_INLINE F range_max(const T* x, int64_t begin, int64_t end) {
  Vec<F> largest = all(-F(INFINITY));
  for_vectors<F>(end - begin, [&](int64_t v, auto part) __attribute__((always_inline)) {
    largest = max_of(part.get(x + begin + v, -F(INFINITY)), largest);
  });
  return largest_of(largest);
}

template <class T> __attribute__((noinline)) int64_t first_nan(const T* x, int64_t V) {
  for (int64_t v = 0; v < V; ++v)
    if (widen(x[v]) != widen(x[v])) return v;
  return V;
}

// The lowest index of the row's largest element; of its first NaN if there is one. Looks at some vectors at once before
// it looks at their elements.
template <class F, class T> KDAIF_INLINE int64_t first_index(const T* x, F largest, bool has_softmax, int64_t V) {
  if (!has_softmax) {
    const int64_t at = first_nan(x, V);
    if (at < V) return at;
  }
  constexpr int64_t BLOCK = 4 * LANES<F>;
  int64_t v = 0;
  for (; v + BLOCK <= V; v += BLOCK) {
    Vec<F> found{};
    for (int64_t i = 0; i < BLOCK; i += LANES<F>) found = select(load(x + v + i) == largest, all(F(1)), found);
    if (largest_of(found) > 0) break;
  }
  while (v < V - 1 && F(widen(x[v])) != largest) ++v;
  return v;
}

// Sums over both rows.
template <class F>
struct PairSums {
  StatSums<F> student, teacher;
  F forward = 0, reverse = 0;  // sum e_t (x_t - x_s), sum e_s (x_s - x_t)
};

template <bool TEACHER, class F, class T>
KDAIF_INLINE void add_range(const T* s, const T* t, F max_s, F max_t, F to_log2, int64_t begin, int64_t end, PairSums<F>& sums) {
  Vec<F> student{}, teacher{}, student_mean{}, teacher_mean{}, forward{}, reverse{};  // weighted with powers of 2
  for_vectors<F>(end - begin, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> log_q = (part.get(s + begin + v, -F(INFINITY)) - max_s) * to_log2, q = exp2_of(log_q);
    student += q;
    // A class without probability contributes nothing, even where its logit is -inf.
    student_mean += select(q > F(0), q * log_q, q);
    if constexpr (TEACHER) {
      const Vec<F> log_p = (part.get(t + begin + v, -F(INFINITY)) - max_t) * to_log2, p = exp2_of(log_p);
      const Vec<F> apart = log_p - log_q;
      teacher += p;
      teacher_mean += select(p > F(0), p * log_p, p);
      forward += select(p > F(0), p * apart, p);
      reverse -= select(q > F(0), q * apart, q);
    }
  });
  sums.student.total += sum_of(student), sums.student.mean += sum_of(student_mean) * F(LN_2);
  if constexpr (TEACHER) {
    sums.teacher.total += sum_of(teacher), sums.teacher.mean += sum_of(teacher_mean) * F(LN_2);
    sums.forward += sum_of(forward) * F(LN_2), sums.reverse += sum_of(reverse) * F(LN_2);
  }
}

template <bool TEACHER, class F, class T>
KDAIF_INLINE PairSums<F> sum_rows(const T* s, const T* t, F max_s, F max_t, const RowStatsRows& rows) {
  const F to_log2 = F(LOG2_E / rows.temperature);
  const int64_t first = rows.first_class, last = first + rows.class_count;
  PairSums<F> sums;
  if (rows.class_count > 0) add_range<TEACHER>(s, t, max_s, max_t, to_log2, first, last, sums);
  sums.student.mass = sums.student.total, sums.teacher.mass = sums.teacher.total;
  if (first > 0) add_range<TEACHER>(s, t, max_s, max_t, to_log2, 0, first, sums);
  if (last < rows.classes) add_range<TEACHER>(s, t, max_s, max_t, to_log2, last, rows.classes, sums);
  return sums;
}

// The largest logit of the classes other than `of`: the row's maximum unless that is what `of` has.
template <class F, class T> KDAIF_INLINE F largest_other(const T* x, F largest, int64_t of, int64_t V) {
  if (F(widen(x[of])) != largest) return largest;
  const F before = range_max<F>(x, 0, of), after = range_max<F>(x, of + 1, V);
  return before > after ? before : after;
}

// One network's statistics; returns its arg-max.
template <class F, class T>
KDAIF_INLINE int64_t write_side(const T* x, F largest, const StatSums<F>& sums, const RowStatsRows& rows, int64_t row, F* out) {
  const int64_t V = rows.classes, argmax = first_index(x, largest, sums.total == sums.total, V);
  const bool labels = rows.labels != nullptr, known = labels && rows.labels[row] != rows.ignore_index;
  const int64_t of = known ? rows.labels[row] : argmax;
  const StatLogits<F> logits{largest, widen(x[of]), largest_other(x, largest, of, V)};
  write_stats(sums, logits, F(rows.temperature), {labels, known, rows.class_count > 0}, out + row, rows.rows);
  return argmax;
}

// Divergences of nearly equal distributions, term by term: none is negative, and none is a difference of large numbers.
template <class F, class T>
__attribute__((noinline)) StatDivergences<F> small_divergences(const T* s, const T* t, F max_s, F max_t, F temperature,
                                                               const PairSums<F>& sums, int64_t V) {
  const F inverse = 1 / temperature, log_ratio = log_of(sums.student.total / sums.teacher.total);
  const F p_scale = 1 / sums.teacher.total, q_scale = 1 / sums.student.total;
  Vec<F> forward{}, reverse{};
  for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> x = (part.get(s + v, -F(INFINITY)) - max_s) * inverse, log_p = (part.get(t + v, -F(INFINITY)) - max_t) * inverse;
    const Vec<F> p = exp_of(log_p) * p_scale, q = exp_of(x) * q_scale, log_q = x - log_ratio;
    forward += divergence<F>(p, log_p, q, log_q, true);
    reverse += divergence<F>(q, log_q, p, log_p, true);
  });
  return {sum_of(forward), sum_of(reverse)};
}

template <bool TEACHER, class T>
void stats_rows(const RowStatsRows& rows, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const int64_t N = rows.rows, V = rows.classes;
  const F temperature = F(rows.temperature);
  F* out = static_cast<F*>(rows.stats);
  for (int64_t i = begin; i < end; ++i) {
    const T* s = static_cast<const T*>(rows.student) + i * rows.student_stride;
    const T* t = TEACHER ? static_cast<const T*>(rows.teacher) + i * rows.teacher_stride : s;
    const F max_s = range_max<F>(s, 0, V), max_t = TEACHER ? range_max<F>(t, 0, V) : max_s;
    const PairSums<F> sums = sum_rows<TEACHER>(s, t, max_s, max_t, rows);
    rows.argmax[i] = write_side(s, max_s, sums.student, rows, i, out);
    if constexpr (TEACHER) {
      rows.argmax[N + i] = write_side(t, max_t, sums.teacher, rows, i, out + STATS_ALONE * N);
      StatDivergences<F> kl = stat_divergences(sums.forward, sums.reverse, sums.student.total, sums.teacher.total);
      if (one_is_small(kl)) kl = small_divergences(s, t, max_s, max_t, temperature, sums, V);
      out[STAT_FORWARD_KL * N + i] = lifted(kl.forward);
      out[STAT_REVERSE_KL * N + i] = lifted(kl.reverse);
    }
  }
}

}  // namespace

void row_stats_rows(const RowStatsRows& rows, ElementType type, int64_t begin, int64_t end) {
  for_type(type, [&](auto element) {
    using T = decltype(element);
    if (rows.teacher != nullptr) stats_rows<true, T>(rows, begin, end);
    else stats_rows<false, T>(rows, begin, end);
  });
}

}  // namespace kdaif::KDAIF_LEVEL
