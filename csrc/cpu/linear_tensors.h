// What the ops of a linear layer ask of their tensors, on the CPU. What would read outside a tensor is refused here,
// whoever calls; friendlier messages come from Python.
#pragma once
#include <algorithm>

#include "common/row_divergence_tensors.h"
#include "cpu/linear_rows.h"

namespace kdaif {

inline ElementType element_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    case ScalarType::Half: return ElementType::float16;
    default: STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
}

// The layer, and the tensors that must live as long as it.
struct HeldLinearLayer {
  HeldLinearLayer(const char* op, const Tensor& a, const Tensor& b) : inputs(checked(op, a)), output_grads(checked(op, b)) {
    STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == b.size(1), op, ": inputs and output_grads differ in shape");
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": inputs and output_grads differ in dtype");
    layer = {positions(inputs), positions(output_grads), a.size(0), a.size(1), element_type(op, a)};
  }

  int64_t I() const { return layer.inputs.width; }
  int64_t O() const { return layer.output_grads.width; }

  void check_directions(const char* op, const Tensor& v) const {
    STD_TORCH_CHECK(v.dim() == 3 && v.size(1) == O() && v.size(2) == I(), op, ": directions must be [K, O, I]");
  }

  Tensor inputs, output_grads;
  LinearLayer layer;

 private:
  static Tensor checked(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, op, ": inputs and output_grads must be [N, T, features]");
    return with_dense_rows(x);
  }
  static Positions positions(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.size(2)}; }
};

inline Tensor as_type(const Tensor& x, ScalarType type) { return x.scalar_type() == type ? x : torch::stable::to(x, type); }

// Panels of 16 features or positions, as cpu/panels.h packs them.
inline int64_t panels(int64_t columns) { return (columns + 15) / 16; }

// How many pieces of `work` multiply-adds make a task: a million take some 20 microseconds, and waking a thread a few.
inline int64_t grain_of(int64_t work) { return std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, work)); }

}  // namespace kdaif
