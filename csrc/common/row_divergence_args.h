// The arguments of row_divergence as kernels see them: pointers and numbers. Names, shapes and meaning as in
// kdaif_fast/reference/row_divergence.py. T is the logits' type, F the accumulation type; strides count elements.
#pragma once
#include <cstdint>

#include "common/row_divergence_math.h"

namespace kdaif {

struct RowDivergence {
  const void* student;       // T [N, V]
  const void* teacher;       // [N, C] or [N, top_k]; T for LOGITS, else F; null without a divergence
  const int64_t* indices;    // [N, top_k] contiguous, for TOP_K
  const void* second;        // [N, C], like teacher; null if there is none, as below
  const int64_t* labels;     // [N]
  const void* soft_labels;   // F [N, V]
  const void* class_weight;  // F [V]
  const uint8_t* mask;       // [N, C], mask_stride 0 where it is the same for all rows
  const void* weight;        // F [N]
  const void* rows;          // F [7, N] contiguous, instead of the first seven numbers
  int64_t student_stride, teacher_stride, second_stride, soft_labels_stride, mask_stride;
  double temperature, ce, kd, other, label_mix, interpolation, gate, smoothing, skew;
  int kind, form;
  bool mixes, exclude_label;
  int64_t first_class, class_count, ignore_index, top_k, N, V;
};

template <class F>
KDAIF_SHARED RowSettings<F> row_settings(const RowDivergence& d, int64_t i) {
  if (d.rows == nullptr)
    return {F(d.temperature), F(d.ce), F(d.kd), F(d.other), F(d.label_mix), F(d.interpolation), F(d.gate)};
  const F* x = static_cast<const F*>(d.rows) + i;
  return {x[0], x[d.N], x[2 * d.N], x[3 * d.N], x[4 * d.N], x[5 * d.N], x[6 * d.N]};
}

template <class F>
KDAIF_SHARED F row_weight(const RowDivergence& d, int64_t i) {
  return d.weight == nullptr ? F(1) : static_cast<const F*>(d.weight)[i];
}

}  // namespace kdaif
