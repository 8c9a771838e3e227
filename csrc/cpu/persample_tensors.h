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

}  // namespace kdaif
