// One row of row_divergence in the hands of one block, with every option: what kdaif_fast/reference/row_terms.py calls
// `row` and `terms`. All threads hold the same Row; loops go over the row's classes in steps of the block.
#pragma once
#include "cuda/row_divergence_common.cuh"

namespace kdaif {

constexpr int TOP_K_TILE = 1024;

// The block's shared memory.
template <class F, int threads>
struct RowMemory {
  F sums[threads / WARP];
  F tile[TOP_K_TILE];  // the target of so many classes, spread out from the top-k form
};

template <class F>
struct ClassTerm {
  F q = 0;
  Term<F> term{};
};

template <int kind, class F>
struct Row {
  const RowDivergence& d;
  const Element element;
  const int64_t row, label, label_class;
  const bool label_legal;
  const RowSettings<F> x;
  const F inverse;
  F weight;
  Softmax<F> student, target, second;
  F top_rest = 0;       // probability of a class that is not among the top k
  F total = 1;          // what a target without the label is divided by
  F inverse_count = 1;  // 1 / number of classes that take part
  F label_p = 0;        // the label's share in a mixed target
  LabelPart<F> part;
  F log_p_y = 0, log_p_rest = 0;

  __device__ __forceinline__ Row(const RowDivergence& d, Element element, int64_t row, const RowLabel& y)
      : d(d), element(element), row(row), label(y.label), label_class(y.label < 0 ? -1 : y.label - d.first_class),
        label_legal(y.legal), x(row_settings<F>(d, row)), inverse(1 / x.temperature),
        weight(y.legal ? row_weight<F>(d, row) : F(NAN)) {
    part.log_q_y = part.log_q_rest = lowest<F>();
  }

  // Parts without weight are not looked at.
  __device__ __forceinline__ bool diverges() const {
    constexpr bool has_other = kind == KL || kind == DECOUPLED;
    return d.teacher != nullptr && (x.kd != 0 || (has_other && x.other != 0));
  }
  __device__ __forceinline__ bool leaves_label() const { return kind == DECOUPLED || d.exclude_label; }
  __device__ __forceinline__ bool is_plain() const { return d.form == LOGITS && !d.mixes; }
  __device__ __forceinline__ F chain() const { return kind == LOGIT_MSE ? F(1) : inverse; }

  __device__ __forceinline__ bool is_allowed(int64_t j) const {
    return d.mask == nullptr || row_at(d.mask, row, d.mask_stride)[j] != 0;
  }
  __device__ __forceinline__ bool takes_part(int64_t j) const {
    return is_allowed(j) && !(leaves_label() && j == label_class);
  }
  __device__ __forceinline__ bool label_allowed() const {
    return label_legal && 0 <= label_class && label_class < d.class_count && is_allowed(label_class);
  }
  __device__ __forceinline__ F class_weight(int64_t v) const {
    return d.class_weight == nullptr ? F(1) : static_cast<const F*>(d.class_weight)[v];
  }
  __device__ __forceinline__ F logit(int64_t v) const {
    return load<F>(d.student, element, row * d.student_stride + v);
  }
  __device__ __forceinline__ F student_logit(int64_t j) const { return logit(d.first_class + j); }
  __device__ __forceinline__ F second_logit(int64_t j) const {
    return load<F>(d.second, element, row * d.second_stride + j);
  }

  // The logits that make the target: the teacher's, the student's own, or between the two.
  __device__ __forceinline__ F target_logit(int64_t j) const {
    if (x.interpolation == 0) return student_logit(j);
    const F t = load<F>(d.teacher, element, row * d.teacher_stride + j);
    return x.interpolation == 1 ? t : x.interpolation * t + (1 - x.interpolation) * student_logit(j);
  }

  // Calls body(j, p) for every class of the divergence; p is its probability in the top-k form, else nothing.
  template <class Body>
  __device__ __forceinline__ void for_each_class(F* tile, Body body) const {
    const int64_t C = d.class_count, length = d.form == TOP_K ? TOP_K_TILE : C;
    for (int64_t first = 0; first < C; first += length) {
      const int64_t end = first + length < C ? first + length : C;
      if (d.form == TOP_K) spread_top_k(tile, first);
      for (int64_t j = first + threadIdx.x; j < end; j += blockDim.x) body(j, d.form == TOP_K ? tile[j - first] : F(0));
    }
  }

  // Each element of the tile is filled by the thread that reads it, so nobody who still reads the tile before is
  // disturbed.
  __device__ __forceinline__ void spread_top_k(F* tile, int64_t first) const {
    for (int i = threadIdx.x; i < TOP_K_TILE; i += blockDim.x) tile[i] = top_rest;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < d.top_k; i += blockDim.x) {
      const int64_t j = d.indices[row * d.top_k + i] - first;
      if (0 <= j && j < TOP_K_TILE) tile[j] = top_value(i);
    }
    __syncthreads();
  }
  __device__ __forceinline__ F top_value(int64_t i) const {
    return static_cast<const F*>(d.teacher)[row * d.teacher_stride + i];
  }

  // The classes that the top k leaves out share what is left of 1.
  __device__ __forceinline__ void sum_top_k(F* sums, bool check) {
    F sum = 0, wrong = 0;
    for (int64_t i = threadIdx.x; i < d.top_k; i += blockDim.x) {
      const int64_t index = d.indices[row * d.top_k + i];
      const bool legal = 0 <= index && index < d.class_count;
      if (check && !legal) refuse_index(row, i, index, d.class_count);
      sum += top_value(i);
      wrong += legal ? F(0) : F(1);
    }
    const F rest = 1 - block_reduce<Sum>(sum, sums);
    const int64_t others = d.class_count > d.top_k ? d.class_count - d.top_k : 1;
    top_rest = (rest < 0 ? F(0) : rest) / F(others);
    if (block_reduce<Sum>(wrong, sums) > 0) weight = F(NAN);
  }

  // Everything that terms need of the row as a whole.
  template <class Memory>
  __device__ __forceinline__ void prepare(Memory& memory, bool check) {
    if (d.form == TOP_K) sum_top_k(memory.sums, check);
    F count = 0;
    for (int64_t j = threadIdx.x; j < d.class_count; j += blockDim.x) add(j, count);
    if (kind == PROBABILITY_MSE || kind == LOGIT_MSE) {
      count = block_reduce<Sum>(count, memory.sums);
      inverse_count = 1 / (count < 1 ? F(1) : count);
    }
    if constexpr (!is_between_logits(kind)) {
      student.join(inverse, memory.sums);
      if (d.form == LOGITS) target.join(inverse, memory.sums);
      if (d.form == LOGITS && d.second != nullptr) second.join(inverse, memory.sums);
      if (!is_plain() && leaves_label()) sum_mixture(memory);
      if (kind == DECOUPLED) prepare_label();
    }
  }

  // A mixture is formed of softmaxes over all allowed classes; what is no mixture leaves the label out at once.
  __device__ __forceinline__ void add(int64_t j, F& count) {
    const bool taking_part = takes_part(j);
    if (taking_part) count += 1;
    if constexpr (!is_between_logits(kind)) {
      if (taking_part) student.add(student_logit(j), inverse);
      if (d.form != LOGITS || !(taking_part || (!is_plain() && is_allowed(j)))) return;
      target.add(target_logit(j), inverse);
      if (!is_plain() && d.second != nullptr) second.add(second_logit(j), inverse);
    }
  }

  template <class Memory>
  __device__ __forceinline__ void sum_mixture(Memory& memory) {
    F sum = 0, at_label = 0;
    for_each_class(memory.tile, [&](int64_t j, F top) {
      if (takes_part(j)) sum += mixed(j, top);
      else if (is_allowed(j)) at_label += mixed(j, top);
    });
    total = block_reduce<Sum>(sum, memory.sums);
    label_p = block_reduce<Sum>(at_label, memory.sums);
    part.p_rest = total;
    if (!(total > 0)) total = 1;
  }

  // The target's probability of an allowed class, before the label is left out.
  __device__ __forceinline__ F mixed(int64_t j, F top) const {
    F p = top;
    if (d.form == LOGITS) p = exp_of(target.log_probability(target_logit(j), inverse));
    if (d.form == PROBABILITIES) p = static_cast<const F*>(d.teacher)[row * d.teacher_stride + j];
    if (d.second != nullptr) {
      const F q = d.form == LOGITS ? exp_of(second.log_probability(second_logit(j), inverse))
                                   : static_cast<const F*>(d.second)[row * d.second_stride + j];
      p = (1 - x.gate) * p + x.gate * q;
    }
    return d.mixes ? (1 - x.label_mix) * p + x.label_mix * given_label(d.first_class + j) : p;
  }
  __device__ __forceinline__ F given_label(int64_t v) const {
    if (d.soft_labels == nullptr) return v == label ? F(1) : F(0);
    return static_cast<const F*>(d.soft_labels)[row * d.soft_labels_stride + v];
  }

  // log of the label's and of the others' probability, from the softmax without the label and the label's logit.
  __device__ __forceinline__ void split_label(const Softmax<F>& others, F at_label, F& log_y, F& log_rest) const {
    Softmax<F> all = others;
    all.add(at_label, inverse);
    const F log_all = log_of(all.sum);
    log_y = (at_label - all.max) * inverse - log_all;
    log_rest = others.max == lowest<F>() ? lowest<F>() : (others.max - all.max) * inverse + (others.log_sum - log_all);
  }

  __device__ __forceinline__ void prepare_label() {
    const bool here = label_allowed();
    if (here) {
      split_label(student, student_logit(label_class), part.log_q_y, part.log_q_rest);
    } else if (student.sum != 0) {  // the others are all there is; of no class at all, nothing
      part.log_q_rest = student.log_sum * 0;
    }
    part.p_y = here ? label_p : F(0);
    if (!is_plain()) return;
    log_p_y = lowest<F>(), log_p_rest = target.sum != 0 ? target.log_sum * 0 : lowest<F>();
    if (here) split_label(target, target_logit(label_class), log_p_y, log_p_rest);
    part.p_y = exp_of(log_p_y), part.p_rest = exp_of(log_p_rest);
  }

  __device__ __forceinline__ F label_value() const {
    return is_plain() ? label_part_divergence(part, log_p_y, log_p_rest) : label_part_value(part);
  }

  // Only differences of logarithms count where log q is 0 here; they are formed of the logits, where they are exact.
  __device__ __forceinline__ ClassTerm<F> at(int64_t j, F top) const {
    const TermSettings<F> w{x.kd, x.other, F(d.skew), inverse_count, is_normalised()};
    ClassTerm<F> c;
    if (!takes_part(j)) return c;
    const F s = student_logit(j);
    if constexpr (is_between_logits(kind)) {
      const F t = target_logit(j);
      if (s == t && abs_of(s) == F(INFINITY)) return c;
      c.term = row_term<kind, F, F>(0, (s - t) * chain(), 0, 0, w);
    } else {
      F log_q = student.log_probability(s, inverse), p, log_p;
      c.q = exp_of(log_q);
      if (is_plain()) {
        const F t = target_logit(j);
        log_p = target.log_probability(t, inverse);
        p = exp_of(log_p);
        if constexpr (kind == KL || kind == DECOUPLED) {
          log_p = ((t - target.max) - (s - student.max)) * inverse - (target.log_sum - student.log_sum);
          log_q = 0;
        }
      } else {
        p = mixed(j, top) / total;
        log_p = log_of(p);
      }
      c.term = row_term<kind, F, F>(c.q, log_q, p, log_p, w);
    }
    return weighted(c, class_weight(d.first_class + j));
  }

  __device__ __forceinline__ bool is_normalised() const {
    return d.class_weight == nullptr && (is_plain() || kind == DECOUPLED || d.exclude_label);
  }
  __device__ __forceinline__ static ClassTerm<F> weighted(ClassTerm<F> c, F kappa) {
    c.term.value *= kappa, c.term.first *= kappa, c.term.second *= kappa, c.term.forward *= kappa;
    return c;
  }
};

// The cross-entropy with the labels, as the same row's other part.
template <class F>
struct RowCrossEntropy {
  Softmax<F> student;
  F mass = 0, value = 0;  // of the label's distribution, smoothed and weighted by class; and the cross-entropy with it

  template <int kind>
  __device__ __forceinline__ static F target(const Row<kind, F>& r, int64_t v) {
    const F smoothing = F(r.d.smoothing);
    return r.class_weight(v) * ((1 - smoothing) * r.given_label(v) + smoothing / F(r.d.V));
  }

  template <int kind>
  __device__ __forceinline__ void prepare(const Row<kind, F>& r, F* sums) {
    const RowDivergence& d = r.d;
    for (int64_t v = threadIdx.x; v < d.V; v += blockDim.x) student.add(r.logit(v), F(1));
    student.join(F(1), sums);
    const bool one_class = d.soft_labels == nullptr && d.smoothing == 0;
    if (one_class) {
      if (r.label_legal) add(r, r.label);
      return;
    }
    for (int64_t v = threadIdx.x; v < d.V; v += blockDim.x) add(r, v);
    mass = block_reduce<Sum>(mass, sums);
    value = block_reduce<Sum>(value, sums);
  }

  template <int kind>
  __device__ __forceinline__ void add(const Row<kind, F>& r, int64_t v) {
    const F a = target(r, v);
    mass += a;
    if (a != 0) value -= a * student.log_probability(r.logit(v), F(1));
  }
};

}  // namespace kdaif
