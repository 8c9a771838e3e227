// What the per-sample kernels ask of their tensors.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/row_divergence_rows.h"  // ElementType

namespace kdaif {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ElementType element_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    case ScalarType::Half: return ElementType::float16;
    default: STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
}

// What sums are formed and returned in.
inline ScalarType wide_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis)
    if (a.size(axis) != b.size(axis)) return false;
  return true;
}

inline bool is_matrix(const Tensor& x, int64_t rows, int64_t columns, ScalarType type) {
  return x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && x.scalar_type() == type;
}

// Rows may lie any distance apart; only elements within a row must be neighbours.
inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) <= 1 ? x : torch::stable::contiguous(x);
}

// About 16k elements: below that, waking a thread costs more than the work.
inline int64_t tasks_worth_a_thread(int64_t elements_of_task) {
  return elements_of_task >= 16384 ? 1 : elements_of_task > 0 ? 16384 / elements_of_task : 16384;
}

}  // namespace kdaif
