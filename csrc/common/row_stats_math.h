// The mathematics of one row of row_stats, shared by the CPU and the CUDA kernels: from the row's sums to its
// statistics. The definition is in kdaif_fast/reference/row_stats.py.
//
// With x = (logit - largest logit) / T and e = exp(x), every exponent is <= 0, so nothing overflows, and the sum of e is
// at least 1.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/row_divergence_math.h"  // divergence
#include "common/shared.h"

namespace kdaif {

// Rows of the packed result [STATS_ALONE or STATS_OF_BOTH, N]: these six of the student, the same of the teacher, and
// the divergences.
enum Stat : int { STAT_MAX, STAT_LABEL, STAT_MARGIN, STAT_ENTROPY, STAT_CE, STAT_MASS, STATS_ALONE };
constexpr int STAT_FORWARD_KL = 2 * STATS_ALONE, STAT_REVERSE_KL = STAT_FORWARD_KL + 1, STATS_OF_BOTH = STAT_REVERSE_KL + 1;

// Sums over one network's row.
template <class F>
struct StatSums {
  F total = 0;  // sum e
  F mean = 0;   // sum e x, never above 0
  F mass = 0;   // sum e over the class slice
};

// What else is known of one network's row. `of` is the class whose margin is wanted: the label, or else the arg-max.
template <class F>
struct StatLogits {
  F largest;
  F of;              // logit of that class
  F largest_other;   // of all the other classes; -inf if there are none
};

// What the caller asked for, and whether this row's label is a class (and not ignored).
struct StatWishes {
  bool labels, label_known, mass;
};

// Writes the six statistics of one network's row, `step` apart. NaN where something has no meaning; a row without a
// softmax (NaN, +inf, or -inf everywhere) has total = NaN, and with it every statistic is.
template <class F>
KDAIF_SHARED void write_stats(const StatSums<F>& sums, const StatLogits<F>& logits, F T, StatWishes wishes, F* out,
                              int64_t step) {
  const F nan = F(NAN), log_total = std::log(sums.total);
  const bool defined = sums.total == sums.total;
  const F x = (logits.of - logits.largest) / T;
  const bool label = wishes.labels && wishes.label_known && defined;
  const bool margin = defined && (wishes.label_known || !wishes.labels);
  out[STAT_MAX * step] = 1 / sums.total;
  out[STAT_LABEL * step] = label ? std::exp(x) / sums.total : nan;
  out[STAT_MARGIN * step] = margin ? (logits.of - logits.largest_other) / T : nan;
  out[STAT_ENTROPY * step] = log_total - sums.mean / sums.total;  // both parts are >= 0
  out[STAT_CE * step] = label ? log_total - x : nan;
  out[STAT_MASS * step] = wishes.mass ? sums.mass / sums.total : nan;
}

template <class F>
struct StatDivergences {
  F forward, reverse;  // KL(teacher || student), KL(student || teacher)
};

// From forward = sum e_t (x_t - x_s), reverse = sum e_s (x_s - x_t) and the sums of e.
template <class F>
KDAIF_SHARED StatDivergences<F> stat_divergences(F forward, F reverse, F student, F teacher) {
  const F log_ratio = std::log(student) - std::log(teacher);
  return {forward / teacher + log_ratio, reverse / student - log_ratio};
}

// Where one is, a difference of sums has lost too many digits: both are formed again term by term, by `divergence`.
template <class F>
KDAIF_SHARED bool one_is_small(StatDivergences<F> kl) {
  return kl.forward < F(1.0 / 64) || kl.reverse < F(1.0 / 64);
}

// Rounding can put the divergence of equal distributions a hair below 0; NaN must stay NaN.
template <class F> KDAIF_SHARED F lifted(F kl) { return kl < 0 ? F(0) : kl; }

}  // namespace kdaif
