// persample_dot on the CPU: the choice of an order, threads and registration. The loops are in persample_dot_rows.cpp
// (by positions) and persample_grad_rows.cpp (by gradients), the definition in kdaif_fast/reference/persample_dot.py.
#include "cpu/persample_dot.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/persample_dot_rows.h"
#include "cpu/persample_grad_rows.h"

namespace kdaif {
namespace {

Tensor by_gradients(const HeldLinearLayer& held, const Tensor& directions) {
  const LinearLayer& layer = held.layer;
  const int64_t K = directions.size(0);
  const Tensor dots = torch::stable::new_empty(held.inputs, {layer.N, K}, accumulation_type(held.inputs));
  const PersampleGrad g{layer, nullptr, 0, directions.const_data_ptr(), dots.mutable_data_ptr(), K};
  const int64_t work = (layer.T + 6 * K) * held.O() * held.I();
  torch::stable::parallel_for(0, layer.N, grain_of(work), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(persample_grad_rows, g, begin, end);
  });
  return dots;
}

Tensor by_positions(const HeldLinearLayer& held, const Tensor& directions) {
  const LinearLayer& layer = held.layer;
  const int64_t K = directions.size(0);
  const Tensor dots = torch::stable::new_zeros(held.inputs, {layer.rows(), K}, accumulation_type(held.inputs));
  const PersampleDot d{layer, directions.const_data_ptr(), dots.mutable_data_ptr(), K};
  const int64_t work = 16 * K * held.O() * held.I();
  torch::stable::parallel_for(0, panels(layer.rows()), grain_of(work), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(persample_dot_rows, d, begin, end);
  });
  if (layer.T == 1) return dots;
  return torch::stable::sum(torch::stable::view(dots, {layer.N, layer.T, K}), std::vector<int64_t>{1});
}

Tensor boxed(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions) {
  const HeldLinearLayer held("persample_dot", inputs, output_grads);
  held.check_directions("persample_dot", directions);
  return persample_dot(held, directions);
}

}  // namespace

// By positions costs K T products of O I; by gradients T, and K readings of V for each sample, which measured as much as
// 6 positions each (256 x 256 to 1024 x 256), and packing.
bool dots_by_gradients(int64_t T, int64_t K) { return T >= 64 || T + 6 * K + 4 <= K * T; }

Tensor persample_dot(const HeldLinearLayer& held, const Tensor& directions) {
  const Tensor wide = torch::stable::contiguous(as_type(directions, accumulation_type(held.inputs)));
  return dots_by_gradients(held.layer.T, directions.size(0)) ? by_gradients(held, wide) : by_positions(held, wide);
}

}  // namespace kdaif

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { m.impl("persample_dot", TORCH_BOX(&kdaif::boxed)); }
