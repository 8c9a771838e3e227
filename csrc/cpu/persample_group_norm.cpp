// persample_group_norm on the CPU: tensors, threads and registration. The loops are in persample_group_norm_rows.cpp,
// the definition in kdaif_fast/reference/persample_group_norm.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/level.h"
#include "cpu/persample_group_norm_rows.h"
#include "cpu/persample_tensors.h"

namespace {

using namespace kdaif;

std::tuple<Tensor, Tensor> persample_group_norm(const Tensor& inputs, const Tensor& output_grads, const Tensor& mean, const Tensor& rstd) {
  STD_TORCH_CHECK(inputs.dim() == 3 && same_sizes(inputs, output_grads), "persample_group_norm: inputs and output_grads must be [N, C, L]");
  STD_TORCH_CHECK(inputs.scalar_type() == output_grads.scalar_type(), "persample_group_norm: inputs and output_grads differ in dtype");
  const int64_t N = inputs.size(0), C = inputs.size(1), L = inputs.size(2), groups = mean.dim() == 2 ? mean.size(1) : 0;
  const ScalarType wide = wide_type(inputs);
  STD_TORCH_CHECK(groups > 0 && C % groups == 0 && is_matrix(mean, N, groups, wide) && is_matrix(rstd, N, groups, wide),
                  "persample_group_norm: mean and rstd must be [N, groups] in the accumulation type, groups a divisor of C");
  const Tensor x = with_dense_rows(inputs), b = with_dense_rows(output_grads);
  const Tensor shift = torch::stable::contiguous(mean), scale = torch::stable::contiguous(rstd);
  const Tensor weight_grads = torch::stable::new_empty(inputs, {N, C}, wide), bias_grads = torch::stable::new_empty(inputs, {N, C}, wide);
  const PersampleGroupNorm norm{x.const_data_ptr(), b.const_data_ptr(), x.stride(0), x.stride(1), b.stride(0), b.stride(1),
                                shift.const_data_ptr(), scale.const_data_ptr(), weight_grads.mutable_data_ptr(),
                                bias_grads.mutable_data_ptr(), N, C, L, groups};
  const ElementType type = element_type("persample_group_norm", inputs);
  torch::stable::parallel_for(0, N * C, tasks_worth_a_thread(L), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(persample_group_norm_rows, norm, type, begin, end);
  });
  return {weight_grads, bias_grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) { m.impl("persample_group_norm", TORCH_BOX(&persample_group_norm)); }
