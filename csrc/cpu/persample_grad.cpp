// persample_grad on the CPU: where results go, threads and registration. The loops are in persample_grad_rows.cpp, the
// definition in kdaif_fast/reference/persample_grad.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/huge_pages.h"
#include "cpu/linear_tensors.h"
#include "cpu/persample_dot.h"
#include "cpu/persample_grad_rows.h"

namespace {

using namespace kdaif;

// Writes G to `grads`, and returns its dots with the directions, if there are any.
MaybeTensor run(const HeldLinearLayer& held, const MaybeTensor& directions, const Tensor& grads) {
  const LinearLayer& layer = held.layer;
  const int64_t I = held.I(), O = held.O();
  PersampleGrad g{layer, grads.mutable_data_ptr(), grads.stride(0), nullptr, nullptr, 0};
  MaybeTensor wide, dots;
  // With few positions the dots cost less from the factors than from G: the choice is persample_dot's.
  if (directions && !dots_by_gradients(layer.T, directions->size(0))) {
    dots = persample_dot(held, *directions);
  } else if (directions) {
    wide = torch::stable::contiguous(as_type(*directions, accumulation_type(held.inputs)));
    g.K = directions->size(0);
    dots = torch::stable::new_empty(held.inputs, {layer.N, g.K}, accumulation_type(held.inputs));
    g.directions = wide->const_data_ptr();
    g.dots = dots->mutable_data_ptr();
  }
  torch::stable::parallel_for(0, layer.N, grain_of((layer.T + 8) * O * I), [&](int64_t begin, int64_t end) {
    if (layer.T == 1 && g.K == 0) {
      KDAIF_CALL_LEVEL(outer_product_rows, g, begin, end);
    } else {
      KDAIF_CALL_LEVEL(persample_grad_rows, g, begin, end);
    }
  });
  return dots;
}

Tensor fresh_grads(const HeldLinearLayer& held) {
  const Tensor grads = torch::stable::new_empty(held.inputs, {held.layer.N, held.O(), held.I()});
  prefer_huge_pages(grads.mutable_data_ptr(), grads.numel() * grads.element_size());
  return grads;
}

Tensor persample_grad(const Tensor& inputs, const Tensor& output_grads) {
  const HeldLinearLayer held("persample_grad", inputs, output_grads);
  const Tensor grads = fresh_grads(held);
  run(held, std::nullopt, grads);
  return grads;
}

std::tuple<Tensor, Tensor> persample_grad_dots(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions) {
  const HeldLinearLayer held("persample_grad", inputs, output_grads);
  held.check_directions("persample_grad", directions);
  const Tensor grads = fresh_grads(held);
  const MaybeTensor dots = run(held, directions, grads);
  return {grads, *dots};
}

// Returns the dots, of no directions if there are none: an op has to return something.
Tensor persample_grad_into(const Tensor& inputs, const Tensor& output_grads, const MaybeTensor& directions,
                           const Tensor& out) {
  const HeldLinearLayer held("persample_grad", inputs, output_grads);
  if (directions) held.check_directions("persample_grad", *directions);
  const int64_t N = held.layer.N, O = held.O(), I = held.I();
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == N && out.size(1) == O && out.size(2) == I,
                  "persample_grad: out must be [N, O, I]");
  STD_TORCH_CHECK(out.scalar_type() == inputs.scalar_type(), "persample_grad: out must have the inputs' dtype");
  STD_TORCH_CHECK(out.numel() == 0 || ((I == 1 || out.stride(2) == 1) && (O == 1 || out.stride(1) == I)),
                  "persample_grad: each sample's [O, I] of out must be contiguous");
  const MaybeTensor dots = run(held, directions, out);
  return dots ? *dots : torch::stable::new_empty(inputs, {N, 0}, accumulation_type(inputs));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) {
  m.impl("persample_grad", TORCH_BOX(&persample_grad));
  m.impl("persample_grad_dots", TORCH_BOX(&persample_grad_dots));
  m.impl("persample_grad_into", TORCH_BOX(&persample_grad_into));
}
