// persample_layer_norm on the CPU: tensors, threads and registration. The loops are in persample_layer_norm_rows.cpp,
// the definition in kdaif_fast/reference/persample_layer_norm.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/level.h"
#include "cpu/persample_layer_norm_rows.h"
#include "cpu/persample_tensors.h"

namespace {

using namespace kdaif;

// A sample's features in as many blocks as keep all threads busy; their sums do not depend on it.
int64_t block_size(int64_t samples, int64_t features) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = std::max<int64_t>(1, threads / std::max<int64_t>(1, samples));
  return std::max<int64_t>(64, (features / blocks + 63) / 64 * 64);
}

std::tuple<Tensor, Tensor> persample_layer_norm(const Tensor& inputs, const Tensor& output_grads, const std::optional<Tensor>& mean,
                                                const Tensor& rstd) {
  STD_TORCH_CHECK(inputs.dim() == 3 && same_sizes(inputs, output_grads), "persample_layer_norm: inputs and output_grads must be [N, T, D]");
  STD_TORCH_CHECK(inputs.scalar_type() == output_grads.scalar_type(), "persample_layer_norm: inputs and output_grads differ in dtype");
  const int64_t N = inputs.size(0), T = inputs.size(1), D = inputs.size(2);
  const ScalarType wide = wide_type(inputs);
  STD_TORCH_CHECK(is_matrix(rstd, N, T, wide) && (!mean || is_matrix(*mean, N, T, wide)),
                  "persample_layer_norm: mean and rstd must be [N, T] in the accumulation type");
  const Tensor x = with_dense_rows(inputs), b = with_dense_rows(output_grads), scale = torch::stable::contiguous(rstd);
  const std::optional<Tensor> shift = mean ? std::optional(torch::stable::contiguous(*mean)) : std::nullopt;
  const Tensor weight_grads = torch::stable::new_empty(inputs, {N, D}, wide), bias_grads = torch::stable::new_empty(inputs, {N, D}, wide);
  const int64_t block = block_size(N, D), blocks = (D + block - 1) / block;
  const PersampleLayerNorm norm{x.const_data_ptr(), b.const_data_ptr(), x.stride(0), x.stride(1), b.stride(0), b.stride(1),
                                shift ? shift->const_data_ptr() : nullptr, scale.const_data_ptr(), weight_grads.mutable_data_ptr(),
                                bias_grads.mutable_data_ptr(), N, T, D, blocks, block};
  const ElementType type = element_type("persample_layer_norm", inputs);
  torch::stable::parallel_for(0, N * blocks, tasks_worth_a_thread(T * std::min(block, D)), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(persample_layer_norm_rows, norm, type, begin, end);
  });
  return {weight_grads, bias_grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { m.impl("persample_layer_norm", TORCH_BOX(&persample_layer_norm)); }
