// What kd_loss asks of its tensors, on every device. What would read or write outside a tensor is refused here, whoever
// calls; friendlier messages come from Python.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace kdaif {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows may lie any distance apart; only elements within a row must be neighbours.
inline Tensor with_dense_rows(const Tensor& logits) {
  return logits.stride(1) == 1 || logits.size(1) <= 1 ? logits : torch::stable::contiguous(logits);
}

inline Tensor new_loss(const Tensor& logits) {
  return torch::stable::new_empty(logits, {logits.size(0)}, accumulation_type(logits));
}

inline Tensor new_logits(const Tensor& logits) {
  return torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
}

inline void check_logits(const Tensor& student, const Tensor& other, const Tensor& scale) {
  const int64_t N = student.size(0), V = student.size(1);
  STD_TORCH_CHECK(other.dim() == 2 && other.size(0) == N && other.size(1) == V, "kd_loss: logits differ in shape");
  STD_TORCH_CHECK(other.scalar_type() == student.scalar_type(), "kd_loss: logits differ in dtype");
  STD_TORCH_CHECK(V > 0, "kd_loss: logits have no classes");
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == N && scale.scalar_type() == accumulation_type(student),
                  "kd_loss: one value per row expected, in the accumulation dtype");
}

inline void check_labels(const Tensor& labels, const Tensor& student) {
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == student.size(0) && labels.scalar_type() == ScalarType::Long,
                  "kd_loss: labels must be int64 [N]");
}

}  // namespace kdaif
