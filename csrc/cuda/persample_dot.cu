// persample_dot on the GPU in CUDA C++: the choice of a way, launches and registration. The kernels are in
// persample_dot.cuh, the definition in kdaif_fast/reference/persample_dot.py. With Triton, its kernel answers: it uses tensor
// cores.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "common/row_divergence_tensors.h"
#include "cuda/persample_dot.cuh"

namespace {

using namespace kdaif;

void check(const Tensor& a, const Tensor& b, const Tensor& v) {
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && v.dim() == 3, "persample_dot: tensors must be [N, T, I], [N, T, O] and [K, O, I]");
  STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == b.size(1), "persample_dot: inputs and output_grads differ in shape");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "persample_dot: inputs and output_grads differ in dtype");
  STD_TORCH_CHECK(v.size(1) == b.size(2) && v.size(2) == a.size(2), "persample_dot: directions must be [K, O, I]");
}

Tensor as_type(const Tensor& x, ScalarType type) { return x.scalar_type() == type ? x : torch::stable::to(x, type); }

template <class T>
Strided<T> strided(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
void launch(const Tensor& a, const Tensor& b, const Tensor& v, const Tensor& dots) {
  using F = typename Accumulate<T>::type;
  const int64_t N = a.size(0), positions_each = a.size(1), K = v.size(0), O = b.size(2);
  const int64_t positions = N * positions_each, part = dot_part(positions, O, K), parts = (O + part - 1) / part;
  const Tensor partial = torch::stable::new_empty(dots, {K, parts, positions});
  const PersampleDotArguments<T, F> arguments{strided<T>(a),
                                              strided<T>(b),
                                              strided<F>(v),
                                              static_cast<F*>(partial.mutable_data_ptr()),
                                              static_cast<F*>(dots.mutable_data_ptr()),
                                              N,
                                              positions_each,
                                              a.size(2),
                                              O,
                                              K,
                                              part,
                                              parts};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(a.get_device_index(), &stream));
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t blocks = (positions + DOT_ROWS - 1) / DOT_ROWS * K * parts, warps = SUM_THREADS / WARP;
  persample_dot_kernel<T, F><<<dot_grid(blocks), DOT_THREADS, 0, on>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_of_sample_kernel<T, F><<<dot_grid((N * K + warps - 1) / warps), SUM_THREADS, 0, on>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A V^T by the vendor's library, stored, and contracted with b.
Tensor by_vendor(const Tensor& inputs, const Tensor& output_grads, const Tensor& v) {
  const int64_t N = inputs.size(0), T = inputs.size(1), I = inputs.size(2), O = output_grads.size(2), K = v.size(0);
  const Tensor a = torch::stable::contiguous(as_type(inputs, v.scalar_type()));
  const Tensor b = torch::stable::contiguous(as_type(output_grads, v.scalar_type()));
  const Tensor matrix = torch::stable::transpose(torch::stable::view(torch::stable::contiguous(v), {K * O, I}), 0, 1);
  const Tensor product = torch::stable::matmul(torch::stable::view(a, {N * T, I}), matrix);
  const Tensor dots = torch::stable::matmul(torch::stable::view(product, {N * T, K, O}), torch::stable::view(b, {N * T, O, 1}));
  return torch::stable::sum(torch::stable::view(dots, {N, T, K}), std::vector<int64_t>{1});
}

Tensor persample_dot(const Tensor& inputs, const Tensor& output_grads, const Tensor& directions) {
  check(inputs, output_grads, directions);
  const int64_t N = inputs.size(0), T = inputs.size(1), I = inputs.size(2), O = output_grads.size(2), K = directions.size(0);
  torch::stable::accelerator::DeviceGuard guard(inputs.get_device_index());
  const ScalarType wide = accumulation_type(inputs);
  if (N * T * I * O * K == 0) return torch::stable::new_zeros(inputs, {N, K}, wide);
  const Tensor v = as_type(directions, wide);
  if (vendor_multiplies(N * T, I, O, K)) return by_vendor(inputs, output_grads, v);
  const Tensor dots = torch::stable::new_empty(inputs, {N, K}, wide);
  switch (inputs.scalar_type()) {
    case ScalarType::Float: launch<float>(inputs, output_grads, v, dots); break;
    case ScalarType::Double: launch<double>(inputs, output_grads, v, dots); break;
    case ScalarType::BFloat16: launch<bfloat16>(inputs, output_grads, v, dots); break;
    case ScalarType::Half: launch<float16>(inputs, output_grads, v, dots); break;
    default: STD_TORCH_CHECK(false, "persample_dot: tensors must be float32, float64, bfloat16 or float16");
  }
  return dots;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CUDA, m) { m.impl("persample_dot", TORCH_BOX(&persample_dot)); }
