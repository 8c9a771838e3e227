// The ops of the row_divergence family, in terms of what a device has to bring. Here tensors are checked and turned into
// RowDivergence: what would read or write outside a tensor is refused, whoever calls; friendlier messages come from
// Python.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/row_divergence_args.h"

namespace kdaif {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows may lie any distance apart; only elements within a row must be neighbours.
inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) <= 1 ? x : torch::stable::contiguous(x);
}

inline Tensor new_loss(const Tensor& student) {
  return torch::stable::new_empty(student, {student.size(0)}, accumulation_type(student));
}

// The arguments as pointers, and the tensors that must live as long as those.
struct HeldRowDivergence {
  RowDivergence d{};
  std::vector<Tensor> held;
};

// An op's arguments from `student` on, in the order of its schema.
struct RowInputs {
  const Tensor& student;
  const MaybeTensor &teacher, &indices, &second, &labels, &soft_labels, &class_weight, &mask, &weight, &rows;
  const std::vector<double>& numbers;
  const std::vector<int64_t>& choices;
};

inline const void* matrix(HeldRowDivergence& h, const MaybeTensor& x, ScalarType type, int64_t N, int64_t columns,
                          int64_t& stride, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == N && x->size(1) == columns, "row_divergence: ", name, " has the wrong shape");
  STD_TORCH_CHECK(x->scalar_type() == type, "row_divergence: ", name, " has the wrong dtype");
  h.held.push_back(with_dense_rows(*x));
  stride = h.held.back().stride(0);
  return h.held.back().const_data_ptr();
}

inline const void* vector(HeldRowDivergence& h, const MaybeTensor& x, ScalarType type, int64_t size, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == size, "row_divergence: ", name, " has the wrong shape");
  STD_TORCH_CHECK(x->scalar_type() == type, "row_divergence: ", name, " has the wrong dtype");
  h.held.push_back(torch::stable::contiguous(*x));
  return h.held.back().const_data_ptr();
}

inline HeldRowDivergence hold(const RowInputs& in) {
  HeldRowDivergence h;
  h.held.reserve(12);
  RowDivergence& d = h.d;
  STD_TORCH_CHECK(in.student.dim() == 2 && in.student.size(1) > 0, "row_divergence: student must be [N, V] with V > 0");
  STD_TORCH_CHECK(in.numbers.size() == 9 && in.choices.size() == 7, "row_divergence: 9 numbers and 7 choices expected");
  const ScalarType type = in.student.scalar_type(), wide = accumulation_type(in.student);
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "row_divergence: logits must be float32, float64, bfloat16 or float16");
  const int64_t N = d.N = in.student.size(0), V = d.V = in.student.size(1);
  const auto& x = in.numbers;
  d.temperature = x[0], d.ce = x[1], d.kd = x[2], d.other = x[3], d.label_mix = x[4], d.interpolation = x[5], d.gate = x[6];
  d.smoothing = x[7], d.skew = x[8];
  const auto& c = in.choices;
  d.kind = static_cast<int>(c[0]), d.form = static_cast<int>(c[1]), d.mixes = c[2] != 0, d.exclude_label = c[3] != 0;
  d.first_class = c[4], d.class_count = c[5], d.ignore_index = c[6];
  STD_TORCH_CHECK(KL <= d.kind && d.kind <= SWAPPED_CROSS_ENTROPY && LOGITS <= d.form && d.form <= TOP_K, "row_divergence: unknown kind or form");
  d.top_k = d.form == TOP_K && in.indices.has_value() ? in.indices->size(1) : 0;
  if (d.class_count < 0) d.class_count = d.form == TOP_K || !in.teacher.has_value() ? V - d.first_class : in.teacher->size(1);
  STD_TORCH_CHECK(0 <= d.first_class && 1 <= d.class_count && d.class_count <= V - d.first_class, "row_divergence: the divergence's classes are not among the student's");
  STD_TORCH_CHECK((d.form == TOP_K) == in.indices.has_value(), "row_divergence: indices are for the top-k form");

  const ScalarType teacher_type = d.form == LOGITS ? type : wide;
  h.held.push_back(with_dense_rows(in.student));
  d.student = h.held.back().const_data_ptr();
  d.student_stride = h.held.back().stride(0);
  d.teacher = matrix(h, in.teacher, teacher_type, N, d.form == TOP_K ? d.top_k : d.class_count, d.teacher_stride, "teacher");
  d.second = matrix(h, in.second, teacher_type, N, d.class_count, d.second_stride, "second");
  d.soft_labels = matrix(h, in.soft_labels, wide, N, V, d.soft_labels_stride, "soft_labels");
  if (in.indices.has_value()) {
    STD_TORCH_CHECK(in.indices->dim() == 2 && in.indices->size(0) == N && in.indices->scalar_type() == ScalarType::Long,
                    "row_divergence: indices must be int64 [N, k]");
    h.held.push_back(torch::stable::contiguous(*in.indices));
    d.indices = h.held.back().const_data_ptr<int64_t>();
  }
  if (in.mask.has_value()) {
    const Tensor& mask = *in.mask;
    STD_TORCH_CHECK(mask.dim() == 2 && (mask.size(0) == N || mask.size(0) == 1) && mask.size(1) == d.class_count &&
                        mask.scalar_type() == ScalarType::Bool, "row_divergence: mask must be bool [N or 1, C]");
    h.held.push_back(with_dense_rows(mask));
    d.mask = static_cast<const uint8_t*>(h.held.back().const_data_ptr());
    d.mask_stride = mask.size(0) == 1 ? 0 : h.held.back().stride(0);
  }
  d.labels = static_cast<const int64_t*>(vector(h, in.labels, ScalarType::Long, N, "labels"));
  d.class_weight = vector(h, in.class_weight, wide, V, "class_weight");
  d.weight = vector(h, in.weight, wide, N, "weight");
  if (in.rows.has_value()) {
    STD_TORCH_CHECK(in.rows->dim() == 2 && in.rows->size(0) == 7 && in.rows->size(1) == N && in.rows->scalar_type() == wide,
                    "row_divergence: rows must be [7, N] in the accumulation dtype");
    h.held.push_back(torch::stable::contiguous(*in.rows));
    d.rows = h.held.back().const_data_ptr();
  }
  const bool needs_label = d.exclude_label || d.kind == DECOUPLED;
  STD_TORCH_CHECK(in.labels.has_value() || !needs_label, "row_divergence: labels are needed to leave them out");
  STD_TORCH_CHECK(in.labels.has_value() || in.soft_labels.has_value() || (!in.rows.has_value() && d.ce == 0 && !d.mixes),
                  "row_divergence: labels or soft_labels are needed");
  STD_TORCH_CHECK(d.form == LOGITS || !is_between_logits(d.kind), "row_divergence: a divergence between logits needs logits");
  return h;
}

// run(inputs' pointers, student, loss or null, grad or null) and run_hvp(pointers, student, tangents, gauss_newton, out)
// are the device's.
#define KDAIF_ROW_PARAMETERS                                                                                           \
  const Tensor &student, const MaybeTensor &teacher, const MaybeTensor &indices, const MaybeTensor &second,            \
      const MaybeTensor &labels, const MaybeTensor &soft_labels, const MaybeTensor &class_weight,                      \
      const MaybeTensor &mask, const MaybeTensor &weight, const MaybeTensor &rows, const std::vector<double>& numbers, \
      const std::vector<int64_t>&choices
#define KDAIF_ROW_INPUTS \
  RowInputs { student, teacher, indices, second, labels, soft_labels, class_weight, mask, weight, rows, numbers, choices }

template <auto run>
Tensor row_divergence(KDAIF_ROW_PARAMETERS) {
  const HeldRowDivergence h = hold(KDAIF_ROW_INPUTS);
  const Tensor loss = new_loss(student);
  run(h.d, student, &loss, nullptr);
  return loss;
}

template <auto run>
std::tuple<Tensor, Tensor> row_divergence_with_grad(KDAIF_ROW_PARAMETERS) {
  const HeldRowDivergence h = hold(KDAIF_ROW_INPUTS);
  const Tensor loss = new_loss(student), grad = torch::stable::new_empty(student, {h.d.N, h.d.V});
  run(h.d, student, &loss, &grad);
  return {loss, grad};
}

template <auto run>
Tensor row_divergence_grad(KDAIF_ROW_PARAMETERS) {
  const HeldRowDivergence h = hold(KDAIF_ROW_INPUTS);
  const Tensor grad = torch::stable::new_empty(student, {h.d.N, h.d.V});
  run(h.d, student, nullptr, &grad);
  return grad;
}

// tangents [K, N, V] -> [K, N, V]
template <auto run_hvp>
Tensor row_divergence_hvp(const Tensor& tangents, bool gauss_newton, KDAIF_ROW_PARAMETERS) {
  const HeldRowDivergence h = hold(KDAIF_ROW_INPUTS);
  STD_TORCH_CHECK(tangents.dim() == 3 && tangents.size(1) == h.d.N && tangents.size(2) == h.d.V &&
                      tangents.scalar_type() == student.scalar_type(), "row_divergence: tangents must be [K, N, V], like student");
  const Tensor dense = with_dense_rows(tangents);
  const Tensor out = torch::stable::new_empty(student, {tangents.size(0), h.d.N, h.d.V});
  run_hvp(h.d, student, dense, gauss_newton, out);
  return out;
}

}  // namespace kdaif

#define KDAIF_REGISTER_ROW_DIVERGENCE(m, run, run_hvp)                                      \
  m.impl("row_divergence", TORCH_BOX(&kdaif::row_divergence<run>));                         \
  m.impl("row_divergence_with_grad", TORCH_BOX(&kdaif::row_divergence_with_grad<run>));     \
  m.impl("row_divergence_grad", TORCH_BOX(&kdaif::row_divergence_grad<run>));               \
  m.impl("row_divergence_hvp", TORCH_BOX(&kdaif::row_divergence_hvp<run_hvp>));
