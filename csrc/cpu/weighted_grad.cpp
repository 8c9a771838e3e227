// weighted_grad on the CPU: threads and registration. The loops are in weighted_grad_rows.cpp, the definition in
// kdaif_fast/reference/weighted_grad.py.
#include <torch/csrc/stable/library.h>

#include "cpu/linear_tensors.h"
#include "cpu/weighted_grad_rows.h"

namespace {

using namespace kdaif;

Tensor weighted_grad(const Tensor& inputs, const Tensor& output_grads, const Tensor& weights) {
  const HeldLinearLayer held("weighted_grad", inputs, output_grads);
  const LinearLayer& layer = held.layer;
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == layer.N, "weighted_grad: weights must be [N]");
  if (layer.rows() == 0) return torch::stable::new_zeros(inputs, {held.O(), held.I()});
  const ScalarType wide = accumulation_type(inputs);
  const Tensor wide_weights = as_type(weights, wide), sums = torch::stable::new_empty(inputs, {held.O(), held.I()}, wide);
  const WeightedGrad w{layer, wide_weights.const_data_ptr(), wide_weights.stride(0), sums.mutable_data_ptr()};
  torch::stable::parallel_for(0, panels(held.I()), grain_of(layer.rows() * held.O() * 16), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(weighted_grad_rows, w, begin, end);
  });
  return as_type(sums, inputs.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { m.impl("weighted_grad", TORCH_BOX(&weighted_grad)); }
