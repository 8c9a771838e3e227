// persample_norm on the CPU: the choice of an order, threads and registration. The loops are in persample_norm_rows.cpp,
// the definition in kdaif_fast/reference/persample_norm.py.
#include <torch/csrc/stable/library.h>

#include "cpu/linear_tensors.h"
#include "cpu/persample_norm_rows.h"

namespace {

using namespace kdaif;

// A sample's multiply-adds in each order, whole tiles as they are computed. Both run at the same speed.
struct Costs {
  int64_t gram, gradient;
};
Costs costs_of(const HeldLinearLayer& held) {
  const int64_t T = held.layer.T, I = held.I(), O = held.O(), tiles = panels(T) * (panels(T) + 1) / 2;
  return {256 * tiles * (I + O), 256 * panels(I) * panels(O) * T};
}

Tensor persample_norm(const Tensor& inputs, const Tensor& output_grads) {
  const HeldLinearLayer held("persample_norm", inputs, output_grads);
  const LinearLayer& layer = held.layer;
  const Tensor norms = torch::stable::new_empty(inputs, {layer.N}, accumulation_type(inputs));
  const Costs costs = costs_of(held);
  const NormBy by = layer.T == 1 ? NormBy::lengths : costs.gram <= costs.gradient ? NormBy::gram : NormBy::gradient;
  const PersampleNorm x{layer, norms.mutable_data_ptr(), by};
  const int64_t work = by == NormBy::lengths ? 16 * (held.I() + held.O()) : std::min(costs.gram, costs.gradient);
  torch::stable::parallel_for(0, layer.N, grain_of(work), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(persample_norm_rows, x, begin, end);
  });
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { m.impl("persample_norm", TORCH_BOX(&persample_norm)); }
