// Curvature products of row_divergence: K tangents share a row's distributions. Compiled once per instruction set; see
// row_divergence_rows.cpp.
//
// With u the tangent, <q, u> its mean under q and u~ = u - <q, u>, the divergence's part is
//   second * u~ - q <second, u~> + mass q u~,    mass = - sum of `first`
// in units of 1 / T^2 (docs/method.md, section 5). A plain row has second = 0 and mass = 1: neither teacher nor label
// matter. Floor: one read and one write per tangent, one or two exponentials per class for all of them.
#include "cpu/vector.h"

#include "cpu/row_divergence_rows.h"

#include "cpu/for_type.h"
#include "cpu/row_divergence_general.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// What multiplies tangents in one row. Distributions that do not count are null; the others sum to 1 / ce_inverse and
// 1 / q_inverse.
template <class F>
struct Curvature {
  const F* ce = nullptr;      // softmax(s) [V], times ce_scale
  const F* q = nullptr;       // the divergence's distribution [C], times q_scale
  F ce_inverse = 1, q_inverse = 1;
  const F* second = nullptr;  // [C], times second_scale
  F ce_scale = 0, q_scale = 0, second_scale = 0;
  int64_t first_class = 0, count = 0, label = -1;
  // The label's part of the DECOUPLED divergence: joint_scale (diag - outer product) of the distribution over all
  // classes, which is q_rest * q and q_y at the label.
  F joint_scale = 0, q_y = 0, q_rest = 0;
};

// Softmax of s and of s / T for rows whose divergence is linear in log q.
template <class T, class F>
Curvature<F> plain_curvature(const RowDivergence& d, int64_t i, RowSettings<F> r, F scale, const GeneralRows<F>& x) {
  const T* s = static_cast<const T*>(d.student) + i * d.student_stride;
  if (r.temperature == 1) r.ce += r.kd, r.kd = 0;  // one softmax does
  const F max = row_max<F>(s, d.V), to_log2 = F(LOG2_E), to_log2_T = F(LOG2_E / double(r.temperature));
  const bool ce = r.ce != 0, kd = r.kd != 0, square = ce && kd && r.temperature == 2;
  Vec<F> sum_1{}, sum_T{};
  for_vectors<F>(d.V, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> y = part.get(s + v, -F(INFINITY)) - max;
    Vec<F> e{};
    if (kd) store(e = exp2_of(y * to_log2_T), x.q + v), sum_T += e;
    if (ce) store(e = square ? e * e : exp2_of(y * to_log2), x.student_1 + v), sum_1 += e;
  });
  Curvature<F> curve;
  if (kd) {
    curve.q = x.q, curve.q_inverse = 1 / sum_of(sum_T), curve.count = d.V;
    curve.q_scale = scale * r.kd / (r.temperature * r.temperature) * curve.q_inverse;
  }
  if (ce) {
    curve.ce = x.student_1, curve.ce_inverse = 1 / sum_of(sum_1);
    curve.ce_scale = scale * r.ce * curve.ce_inverse;
  }
  return curve;
}

template <class T, class F>
Curvature<F> general_curvature(const RowDivergence& d, int64_t i, const RowSettings<F>& r, F scale, bool gauss_newton, const GeneralRows<F>& x) {
  const GeneralState<F> state = general_state<true, T>(d, i, r, gauss_newton, x);
  Curvature<F> curve;
  if (state.has_ce) curve.ce = x.student_1, curve.ce_scale = scale * r.ce * state.ce_mass;
  if (!state.has_kd) return curve;
  const F chain = chain_factor(d, r), chained = scale * chain * chain;
  curve.q = x.q, curve.q_scale = chained * state.kept_mass;
  curve.second = x.second, curve.second_scale = chained;
  curve.first_class = d.first_class, curve.count = d.class_count, curve.label = state.label;
  if (state.has_label_part) {
    const LabelPart<F>& l = state.part;
    curve.q_y = std::exp(l.log_q_y), curve.q_rest = std::exp(l.log_q_rest);
    curve.joint_scale = chained * r.kd * (l.p_y + l.p_rest);
    curve.q_scale -= chained * r.kd * l.p_rest;
  }
  return curve;
}

template <class T, class F> KDAIF_INLINE F dot(const F* a, const T* u, int64_t count) {
  Vec<F> sum{};
  for_vectors<F>(count, [&](int64_t c, auto part) __attribute__((always_inline)) { sum += part.get(a + c, F(0)) * part.get(u + c, F(0)); });
  return sum_of(sum);
}

// The divergence's part of one product, added to `sum`.
template <class T, class F> void add_divergence(const Curvature<F>& curve, const T* u, F* sum) {
  const F mean = dot(curve.q, u, curve.count);
  F along = 0;
  if (curve.second != nullptr) {
    Vec<F> total{};
    for_vectors<F>(curve.count, [&](int64_t c, auto part) __attribute__((always_inline)) {
      total += part.get(curve.second + c, F(0)) * (part.get(u + c, F(0)) - mean);
    });
    along = sum_of(total);
  }
  const F u_y = curve.label >= 0 ? F(kdaif::widen(u[curve.label])) : F(0), joint_mean = curve.q_rest * mean + curve.q_y * u_y;
  const F joint = curve.joint_scale * curve.q_rest;
  for_vectors<F>(curve.count, [&](int64_t c, auto part) __attribute__((always_inline)) {
    const Vec<F> x = part.get(u + c, F(0)), centred = x - mean, q = part.get(curve.q + c, F(0));
    Vec<F> h = q * (curve.q_scale * centred - curve.second_scale * along);
    if (curve.second != nullptr) h += curve.second_scale * part.get(curve.second + c, F(0)) * centred;
    if (joint != 0) h += joint * q * (x - joint_mean);
    part.put(part.get(sum + c, F(0)) + h, sum + c);
  });
  if (curve.label >= 0) sum[curve.label] += curve.joint_scale * curve.q_y * (u_y - joint_mean);
}

template <class T, class F> void product(const Curvature<F>& curve, const T* u, F* sum, T* out, int64_t V) {
  const bool whole = curve.second == nullptr && curve.q != nullptr;  // then all in one loop
  F mean_1 = 0, mean_T = 0;
  if (whole && curve.ce != nullptr) {
    Vec<F> sum_1{}, sum_T{};
    for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
      const Vec<F> x = part.get(u + v, F(0));
      sum_1 += part.get(curve.ce + v, F(0)) * x, sum_T += part.get(curve.q + v, F(0)) * x;
    });
    mean_1 = sum_of(sum_1) * curve.ce_inverse, mean_T = sum_of(sum_T) * curve.q_inverse;
  } else {
    if (curve.ce != nullptr) mean_1 = dot(curve.ce, u, V) * curve.ce_inverse;
    if (whole) mean_T = dot(curve.q, u, V) * curve.q_inverse;
  }
  if (whole && curve.ce != nullptr) {
    for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
      const Vec<F> x = part.get(u + v, F(0));
      part.put(curve.q_scale * load(curve.q + v) * (x - mean_T) + curve.ce_scale * load(curve.ce + v) * (x - mean_1), out + v);
    });
  } else if (whole || curve.q == nullptr) {
    const F* q = whole ? curve.q : curve.ce;
    const F scale = whole ? curve.q_scale : curve.ce_scale, mean = whole ? mean_T : mean_1;
    for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
      part.put(scale * load(q + v) * (part.get(u + v, F(0)) - mean), out + v);
    });
  } else {
    for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) {
      store(curve.ce == nullptr ? Vec<F>{} : curve.ce_scale * load(curve.ce + v) * (part.get(u + v, F(0)) - mean_1), sum + v);
    });
    add_divergence(curve, u + curve.first_class, sum + curve.first_class);
    for_vectors<F>(V, [&](int64_t v, auto part) __attribute__((always_inline)) { part.put(load(sum + v), out + v); });
  }
}

template <class T> void products_of(const RowDivergence& d, const RowTangents& k, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  Scratch<F> scratch(GeneralRows<F>::COUNT, d.V);
  const GeneralRows<F> x(scratch);
  const bool plain = is_plain(d);
  for (int64_t i = begin; i < end; ++i) {
    RowSettings<F> r = row_settings<F>(d, i);
    if (d.teacher == nullptr) r.kd = r.other = 0;
    if (d.labels == nullptr && d.soft_labels == nullptr) r.ce = 0;
    const bool ignored = d.labels != nullptr && d.labels[i] == d.ignore_index;
    const bool nothing = ignored || (r.ce == 0 && !wants_divergence(d, r));
    Curvature<F> curve;
    if (!nothing)
      curve = plain && r.other == 0 ? plain_curvature<T>(d, i, r, row_weight<F>(d, i), x)
                                    : general_curvature<T>(d, i, r, row_weight<F>(d, i), k.gauss_newton, x);
    for (int64_t j = 0; j < k.count; ++j) {
      T* out = static_cast<T*>(k.products) + (j * d.N + i) * d.V;
      if (nothing || (curve.ce == nullptr && curve.q == nullptr)) std::memset(out, 0, static_cast<size_t>(d.V) * sizeof(T));
      else product(curve, static_cast<const T*>(k.tangents) + j * k.stride + i * k.row_stride, x.sum, out, d.V);
    }
  }
}

}  // namespace

void row_divergence_hvp_rows(const RowDivergence& d, ElementType type, const RowTangents& tangents, int64_t begin, int64_t end) {
  for_type(type, [&](auto element) { products_of<decltype(element)>(d, tangents, begin, end); });
}

}  // namespace kdaif::KDAIF_LEVEL
