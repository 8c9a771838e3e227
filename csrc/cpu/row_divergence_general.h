// Any row_divergence, one row at a time: the target and the student's distribution are laid out in scratch rows, where
// the terms of the divergence (common/row_divergence_math.h) are taken class by class.
//
// Cost: two or three exponentials and, where the target is a mixture, one logarithm per class, on rows that stay in the
// L1/L2 cache.
#pragma once
#include "common/row_divergence_args.h"
#include "cpu/row_divergence_plain.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// Scratch rows, of C elements but for the last two.
template <class F>
struct GeneralRows {
  static constexpr int COUNT = 9;
  F *q, *log_q, *p, *log_p, *first, *second, *kappa;
  F *student_1;  // [V], softmax(s)
  F *sum;        // [V], where a gradient is put together
  GeneralRows(Scratch<F>& scratch)
      : q(scratch.row(0)), log_q(scratch.row(1)), p(scratch.row(2)), log_p(scratch.row(3)), first(scratch.row(4)),
        second(scratch.row(5)), kappa(scratch.row(6)), student_1(scratch.row(7)), sum(scratch.row(8)) {}
};

// What is known of a row once its terms are there.
template <class F>
struct GeneralState {
  bool has_ce = false, has_kd = false, has_label_part = false;
  F value = 0;         // the loss without its row weight
  F ce_mass = 0;       // mass of the cross-entropy's target
  F first_sum = 0;     // sum of `first`
  F kept_mass = 0;     // what curvature products take for minus that
  int64_t label = -1;  // among the divergence's classes, -1 if it is not
  LabelPart<F> part;
  bool is_plain_target = false;  // a softmax of logits, whose logarithms are known:
  F log_p_y = 0, log_p_rest = 0;
};

template <class F>
struct LogSum {
  F max, log_sum;  // log sum exp(x) = max + log_sum, where x is divided by T already
};

// Classes that take no part: log 0. Returns whether any is left.
template <class F> bool forbid(F* x, const uint8_t* mask, int64_t label, int64_t C, F value) {
  bool any = mask == nullptr && C > (label >= 0);
  if (mask != nullptr)
    for (int64_t c = 0; c < C; ++c) {
      if (!mask[c]) x[c] = value;
      any |= mask[c] && c != label;
    }
  if (label >= 0) x[label] = value;
  return any;
}

// x holds logits; then (x - max) / T, which is the logarithm of the softmax but for log_sum. The softmax goes to p.
// Without any class, both are those of 0.
template <class F> LogSum<F> log_softmax(F* x, F* p, F temperature, int64_t C, F max, bool any) {
  if (!any) {
    for_vectors<F>(C, [&](int64_t c, auto) { store(all(-F(INFINITY)), x + c), store(Vec<F>{}, p + c); });
    return {0, -F(INFINITY)};
  }
  const F inverse = 1 / temperature;
  Vec<F> sum{};
  for_vectors<F>(C, [&](int64_t c, auto part) __attribute__((always_inline)) {
    const Vec<F> scaled = (part.get(x + c, -F(INFINITY)) - max) * inverse, e = exp_of(scaled);
    sum += e;
    store(scaled, x + c), store(e, p + c);
  });
  const F total = sum_of(sum), log_sum = log_of(all(total))[0], scale = 1 / total;
  for_vectors<F>(C, [&](int64_t c, auto) __attribute__((always_inline)) { store(load(p + c) * scale, p + c); });
  return {max * inverse, log_sum};
}

template <class F> void subtract(F* x, F constant, int64_t C) {
  for_vectors<F>(C, [&](int64_t c, auto) __attribute__((always_inline)) { store(load(x + c) - constant, x + c); });
}

// For divergences in which only log p - log q counts: that, from the logits' differences, in log_p, and 0 in log_q. Of
// nearly equal distributions it keeps the digits that log p and log q share.
template <class F> void put_log_ratio(F* log_q, F* log_p, F log_sum_q, F log_sum_p, int64_t C) {
  const F constant = log_sum_p - log_sum_q;
  for_vectors<F>(C, [&](int64_t c, auto) __attribute__((always_inline)) {
    store(load(log_p + c) - load(log_q + c) - constant, log_p + c), store(Vec<F>{}, log_q + c);
  });
}

template <class F> void put_logs(const F* p, F* log_p, int64_t C) {
  for_vectors<F>(C, [&](int64_t c, auto part) __attribute__((always_inline)) { store(log_of(part.get(p + c, F(0))), log_p + c); });
}

// The teacher's logits, interpolated with the student's own. Returns the largest.
template <class T, class F> F put_logits(const T* t, const T* s, F share, F* out, int64_t C) {
  Vec<F> largest = all(-F(INFINITY));
  for_vectors<F>(C, [&](int64_t c, auto part) __attribute__((always_inline)) {
    const Vec<F> low = all(-F(INFINITY));
    Vec<F> x = low;
    if (share != 0) x = part.get(t + c, -F(INFINITY));
    if (share == 0) x = part.get(s + c, -F(INFINITY));
    else if (share != 1) x = share * x + (1 - share) * part.get(s + c, -F(INFINITY));
    largest = max_of(x, largest);
    store(x, out + c);
  });
  return largest_of(largest);
}

// The logits' softmax over the allowed classes in p, and in x its logarithm but for log_sum. max is the largest of x.
template <class F> LogSum<F> allowed_softmax(F* x, F* p, F temperature, const uint8_t* mask, int64_t without, int64_t C, F max) {
  const bool any = forbid(x, mask, without, C, -F(INFINITY));
  if (mask != nullptr || without >= 0) max = row_max<F>(x, C);
  return log_softmax(x, p, temperature, C, max, any);
}

template <class F> void put_top_k(const F* values, const int64_t* indices, int64_t k, F* p, int64_t C) {
  F rest = 1;
  for (int64_t j = 0; j < k; ++j) rest -= values[j];
  rest = rest > 0 && C > k ? rest / F(C - k) : F(0);
  for_vectors<F>(C, [&](int64_t c, auto part) { store(rest * part.inside(F(0)), p + c); });
  for (int64_t j = 0; j < k; ++j) p[indices[j]] = values[j];
}

template <class F> void put_given(const F* values, F* p, int64_t C) {
  for_vectors<F>(C, [&](int64_t c, auto part) __attribute__((always_inline)) { store(part.get(values + c, F(0)), p + c); });
}

// One component of a mixture as probabilities in `p`; log_p is overwritten.
template <class T, class F>
void put_component(const RowDivergence& d, int64_t i, const void* teacher, int64_t stride, F share, const RowSettings<F>& r,
                   const T* s, const uint8_t* mask, F* p, F* log_p) {
  const int64_t C = d.class_count;
  if (d.form == LOGITS) {
    const F max = put_logits(static_cast<const T*>(teacher) + i * stride, s, share, log_p, C);
    allowed_softmax(log_p, p, r.temperature, mask, -1, C, max);
    return;
  }
  const F* values = static_cast<const F*>(teacher) + i * stride;
  if (d.form == TOP_K) put_top_k(values, d.indices + i * d.top_k, d.top_k, p, C);
  else put_given(values, p, C);
  forbid(p, mask, -1, C, F(0));
}

template <class F> F sum_row(const F* x, int64_t C) {
  Vec<F> sum{};
  for_vectors<F>(C, [&](int64_t c, auto part) __attribute__((always_inline)) { sum += part.get(x + c, F(0)); });
  return sum_of(sum);
}

// The target where it is no plain softmax: p and log_p; without the label, if that is to be left out.
template <class T, class F>
void put_mixture(const RowDivergence& d, int64_t i, const RowSettings<F>& r, const T* s, const uint8_t* mask, bool leave_out,
                 const GeneralRows<F>& x, GeneralState<F>& state) {
  const int64_t C = d.class_count;
  put_component(d, i, d.teacher, d.teacher_stride, r.interpolation, r, s, mask, x.p, x.log_p);
  if (d.second != nullptr) {
    put_component(d, i, d.second, d.second_stride, F(1), r, s, mask, x.first, x.log_p);
    for (int64_t c = 0; c < C; ++c) x.p[c] = (1 - r.gate) * x.p[c] + r.gate * x.first[c];
  }
  if (d.mixes) {
    const F beta = r.label_mix;
    const F* soft = d.soft_labels == nullptr ? nullptr : static_cast<const F*>(d.soft_labels) + i * d.soft_labels_stride + d.first_class;
    for (int64_t c = 0; c < C; ++c)
      x.p[c] = (1 - beta) * x.p[c] + (soft != nullptr && (mask == nullptr || mask[c]) ? beta * soft[c] : F(0));
    if (soft == nullptr && state.label >= 0) x.p[state.label] += beta;
  }
  if (leave_out) {
    if (state.label >= 0) state.part.p_y = x.p[state.label], x.p[state.label] = 0;
    const F rest = state.part.p_rest = sum_row(x.p, C);
    for (int64_t c = 0; c < C; ++c) x.p[c] = rest > 0 ? x.p[c] / rest : x.p[c];
  }
  put_logs(x.p, x.log_p, C);
}

// log of the label's and of the others' share, from log sum exp of the others.
template <class F> void shares(F label_logit, LogSum<F> others, F& log_label, F& log_rest) {
  const F a = label_logit - others.max, b = others.log_sum, m = a > b ? a : b;
  log_label = log_rest = m;
  if (m == -F(INFINITY)) return;  // no class takes part
  const F total = m + std::log(std::exp(a - m) + std::exp(b - m));
  log_label = a - total, log_rest = b - total;
}

// For divergences between logits: those, divided by T. A class that both exclude counts for nothing.
template <class F> void put_scaled_logits(F inverse, const GeneralRows<F>& x, int64_t C) {
  for_vectors<F>(C, [&](int64_t c, auto part) __attribute__((always_inline)) {
    const Vec<F> s = load(x.log_q + c), t = load(x.log_p + c), none{};
    const auto excluded = (s == t) & (abs_of(s) == F(INFINITY));
    store(select(excluded, none, s * inverse), x.log_q + c), store(select(excluded, none, t * inverse), x.log_p + c);
    store(none, x.q + c), store(none, x.p + c);
    store(select(excluded, none, part.get(x.kappa + c, F(0))), x.kappa + c);
  });
}

// q, log_q, p and log_p.
template <class T, class F>
void put_distributions(const RowDivergence& d, int64_t i, const RowSettings<F>& r, const T* s, const uint8_t* mask,
                       const GeneralRows<F>& x, GeneralState<F>& state) {
  const int64_t C = d.class_count;
  const bool leave_out = d.exclude_label || d.kind == DECOUPLED;
  const int64_t without = leave_out ? state.label : -1;
  const F max_s = put_logits(s, s, F(0), x.log_q, C);
  if (is_between_logits(d.kind)) {
    const T* t = static_cast<const T*>(d.teacher) + i * d.teacher_stride;
    put_logits(t, s, r.interpolation, x.log_p, C);
    put_scaled_logits(d.kind == LOG_COSH ? 1 / r.temperature : F(1), x, C);
    for (int64_t c = 0; mask != nullptr && c < C; ++c)
      if (!mask[c]) x.kappa[c] = 0;
    if (without >= 0) x.kappa[without] = 0;
    return;
  }
  const F minus_infinity = -F(INFINITY);
  const F label_s = state.label >= 0 ? x.log_q[state.label] / r.temperature : minus_infinity;
  const LogSum<F> student = allowed_softmax(x.log_q, x.q, r.temperature, mask, without, C, max_s);
  state.has_label_part = d.kind == DECOUPLED;
  if (state.has_label_part) shares(label_s, student, state.part.log_q_y, state.part.log_q_rest);
  if (d.form != LOGITS || d.mixes) {
    subtract(x.log_q, student.log_sum, C);
    return put_mixture(d, i, r, s, mask, leave_out, x, state);
  }
  const F max_t = put_logits(static_cast<const T*>(d.teacher) + i * d.teacher_stride, s, r.interpolation, x.log_p, C);
  const F label_t = state.label >= 0 ? x.log_p[state.label] / r.temperature : minus_infinity;
  const LogSum<F> teacher = allowed_softmax(x.log_p, x.p, r.temperature, mask, without, C, max_t);
  state.is_plain_target = true;
  if (state.has_label_part) {
    shares(label_t, teacher, state.log_p_y, state.log_p_rest);
    state.part.p_y = std::exp(state.log_p_y), state.part.p_rest = std::exp(state.log_p_rest);
  }
  if (d.kind == KL || d.kind == DECOUPLED) return put_log_ratio(x.log_q, x.log_p, student.log_sum, teacher.log_sum, C);
  subtract(x.log_q, student.log_sum, C);
  subtract(x.log_p, teacher.log_sum, C);
}

template <int kind, bool SECOND, class F>
void put_terms(const RowDivergence& d, const TermSettings<F>& w, bool weighted, bool gauss_newton, const GeneralRows<F>& x,
               GeneralState<F>& state) {
  Vec<F> value{}, first_sum{}, mass{};
  for_vectors<F>(d.class_count, [&](int64_t c, auto) __attribute__((always_inline)) {
    auto t = row_term<kind, F>(load(x.q + c), load(x.log_q + c), load(x.p + c), load(x.log_p + c), w);
    if (weighted) {
      const Vec<F> kappa = load(x.kappa + c);
      const auto is_out = kappa == F(0);
      t.value = select(is_out, kappa, t.value * kappa), t.first = select(is_out, kappa, t.first * kappa);
      t.second = select(is_out, kappa, t.second * kappa), t.forward = select(is_out, kappa, t.forward * kappa);
    }
    value += t.value, first_sum += t.first;
    store(t.first, x.first + c);
    if constexpr (SECOND) {
      mass += kept_mass<kind>(t, gauss_newton);
      store(kept_curvature<kind>(t, gauss_newton), x.second + c);
    }
  });
  state.value += sum_of(value);
  state.first_sum = sum_of(first_sum);
  if constexpr (SECOND) state.kept_mass = sum_of(mass);
}

// Calls body.operator()<kind>() for the kind.
template <class Body> KDAIF_INLINE void for_kind(int kind, Body body) {
  switch (kind) {
    case KL: return body.template operator()<KL>();
    case CROSS_ENTROPY: return body.template operator()<CROSS_ENTROPY>();
    case JENSEN_SHANNON: return body.template operator()<JENSEN_SHANNON>();
    case SKEW_FORWARD: return body.template operator()<SKEW_FORWARD>();
    case SKEW_REVERSE: return body.template operator()<SKEW_REVERSE>();
    case TOTAL_VARIATION: return body.template operator()<TOTAL_VARIATION>();
    case PROBABILITY_MSE: return body.template operator()<PROBABILITY_MSE>();
    case LOGIT_MSE: return body.template operator()<LOGIT_MSE>();
    case LOG_COSH: return body.template operator()<LOG_COSH>();
    case DECOUPLED: return body.template operator()<DECOUPLED>();
    case SWAPPED_CROSS_ENTROPY: return body.template operator()<SWAPPED_CROSS_ENTROPY>();
  }
}

template <class F> int64_t allowed_count(const uint8_t* mask, int64_t without, int64_t C) {
  int64_t count = C;
  if (mask != nullptr) {
    count = 0;
    for (int64_t c = 0; c < C; ++c) count += mask[c] != 0;
  }
  return count - (without >= 0 && (mask == nullptr || mask[without]));
}

// The divergence's terms. SECOND: for curvature products.
template <bool SECOND, class T, class F>
void put_divergence(const RowDivergence& d, int64_t i, const RowSettings<F>& r, bool gauss_newton, const GeneralRows<F>& x,
                    GeneralState<F>& state) {
  const int64_t C = d.class_count;
  const T* s = static_cast<const T*>(d.student) + i * d.student_stride + d.first_class;
  const uint8_t* mask = d.mask == nullptr ? nullptr : d.mask + i * d.mask_stride;
  if (d.labels != nullptr) {
    const int64_t label = d.labels[i] - d.first_class;
    state.label = 0 <= label && label < C && (mask == nullptr || mask[label]) ? label : -1;
  }
  const bool weighted = d.class_weight != nullptr || is_between_logits(d.kind);
  if (weighted) {
    const F* given = d.class_weight == nullptr ? nullptr : static_cast<const F*>(d.class_weight) + d.first_class;
    for_vectors<F>(C, [&](int64_t c, auto part) {
      store(given != nullptr ? part.get(given + c, F(0)) : part.inside(F(0)), x.kappa + c);
    });
  }
  put_distributions(d, i, r, s, mask, x, state);
  const bool leave_out = d.exclude_label || d.kind == DECOUPLED;
  const int64_t count = allowed_count<F>(mask, leave_out ? state.label : -1, C);
  const bool normalised = d.class_weight == nullptr && ((d.form == LOGITS && !d.mixes) || leave_out);
  const TermSettings<F> w{r.kd, r.other, F(d.skew), F(1) / F(count > 0 ? count : 1), normalised};
  for_kind(d.kind, [&]<int kind>() { put_terms<kind, SECOND>(d, w, weighted, gauss_newton, x, state); });
  if (state.has_label_part && r.kd != 0)
    state.value += r.kd * (state.is_plain_target ? label_part_divergence(state.part, state.log_p_y, state.log_p_rest)
                                                 : label_part_value(state.part));
}

// The cross-entropy's target at one vector of classes: smoothed, and weighted by class.
template <class F, class Part>
KDAIF_INLINE Vec<F> label_target(const RowDivergence& d, int64_t i, int64_t v, Part part) {
  const F share = F(1 - d.smoothing);
  Vec<F> a{};
  if (d.soft_labels != nullptr) a = part.get(static_cast<const F*>(d.soft_labels) + i * d.soft_labels_stride + v, F(0));
  else if (v <= d.labels[i] && d.labels[i] < v + LANES<F>) a[d.labels[i] - v] = 1;
  a = share * a + F(d.smoothing / double(d.V)) * part.inside(F(0));
  return d.class_weight == nullptr ? a : a * part.get(static_cast<const F*>(d.class_weight) + v, F(0));
}

// softmax(s) in x.student_1, the value, and the target's mass.
template <class T, class F>
void put_cross_entropy(const RowDivergence& d, int64_t i, const RowSettings<F>& r, const GeneralRows<F>& x, GeneralState<F>& state) {
  const T* s = static_cast<const T*>(d.student) + i * d.student_stride;
  const F max = row_max<F>(s, d.V);
  Vec<F> sum{};
  for_vectors<F>(d.V, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> e = exp_of(part.get(s + v, -F(INFINITY)) - max);
    sum += e;
    store(e, x.student_1 + v);
  });
  const F total = sum_of(sum), scale = 1 / total, log_sum = log_of(all(total))[0];
  Vec<F> value{}, mass{};
  for_vectors<F>(d.V, [&](int64_t v, auto part) {
    const Vec<F> a = label_target<F>(d, i, v, part), log_q = part.get(s + v, F(0)) - max - log_sum;
    store(load(x.student_1 + v) * scale, x.student_1 + v);
    value += select(a != F(0), -a * log_q, a), mass += a;
  });
  state.has_ce = true;
  state.value += r.ce * sum_of(value);
  state.ce_mass = sum_of(mass);
}

// Whether the divergence of this row counts at all.
template <class F> KDAIF_INLINE bool wants_divergence(const RowDivergence& d, const RowSettings<F>& r) {
  const bool two_parts = d.kind == KL || d.kind == DECOUPLED;
  return d.teacher != nullptr && (r.kd != 0 || (two_parts && r.other != 0));
}

template <bool SECOND, class T, class F>
GeneralState<F> general_state(const RowDivergence& d, int64_t i, const RowSettings<F>& r, bool gauss_newton, const GeneralRows<F>& x) {
  GeneralState<F> state;
  if (r.ce != 0) put_cross_entropy<T>(d, i, r, x, state);
  state.has_kd = wants_divergence(d, r);
  if (state.has_kd) put_divergence<SECOND, T>(d, i, r, gauss_newton, x, state);
  return state;
}

template <class F> KDAIF_INLINE F chain_factor(const RowDivergence& d, const RowSettings<F>& r) {
  return d.kind == LOGIT_MSE ? F(1) : 1 / r.temperature;
}

template <class T, class F>
void general_grad(const RowDivergence& d, int64_t i, const RowSettings<F>& r, F scale, const GeneralRows<F>& x,
                  const GeneralState<F>& state, T* grad) {
  if (!state.has_ce && !state.has_label_part && d.class_count == d.V) {  // then all in one loop
    const F chain = scale * chain_factor(d, r);
    for_vectors<F>(d.V, [&](int64_t v, auto part) __attribute__((always_inline)) {
      part.put(chain * (load(x.first + v) - load(x.q + v) * state.first_sum), grad + v);
    });
    return;
  }
  for_vectors<F>(d.V, [&](int64_t v, auto part) {
    Vec<F> g{};
    if (state.has_ce) g = scale * r.ce * (state.ce_mass * load(x.student_1 + v) - label_target<F>(d, i, v, part));
    store(g, x.sum + v);
  });
  if (state.has_kd) {
    const F chain = scale * chain_factor(d, r);
    F first_sum = state.first_sum, at_label = 0;
    if (state.has_label_part) {
      const auto along = label_part_grad(state.part);
      first_sum -= r.kd * along.others;
      at_label = r.kd * along.label;
    }
    F* sum = x.sum + d.first_class;
    for_vectors<F>(d.class_count, [&](int64_t c, auto part) __attribute__((always_inline)) {
      const Vec<F> g = chain * (load(x.first + c) - load(x.q + c) * first_sum);
      part.put(part.get(sum + c, F(0)) + g, sum + c);
    });
    if (state.label >= 0) sum[state.label] += chain * at_label;
  }
  for_vectors<F>(d.V, [&](int64_t v, auto part) __attribute__((always_inline)) { part.put(load(x.sum + v), grad + v); });
}

// One row; loss and grad may be null.
template <class T, class F>
void general_row(const RowDivergence& d, int64_t i, const RowSettings<F>& r, F scale, F* loss, T* grad, const GeneralRows<F>& x) {
  const GeneralState<F> state = general_state<false, T>(d, i, r, false, x);
  if (loss != nullptr) *loss = scale * state.value;
  if (grad != nullptr) general_grad(d, i, r, scale, x, state, grad);
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
