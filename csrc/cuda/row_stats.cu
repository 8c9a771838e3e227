// row_stats on the GPU: launches and registration. The kernels are in row_stats.cuh, the definition in
// kdaif_fast/reference/row_stats.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/row_stats_tensors.h"
#include "cuda/row_stats.cuh"

namespace {

using namespace kdaif;

// Not torch::stable's getCurrentStream().id(): before torch 2.13 that is no handle.
cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls body with a value of the logits' element type.
template <class Body>
void for_type(const Tensor& x, Body body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(bfloat16());
    case ScalarType::Half: return body(float16());
    default: STD_TORCH_CHECK(false, "row_stats: logits must be float32, float64, bfloat16 or float16");
  }
}

void run(const RowStatsTensors& tensors) {
  const int64_t N = tensors.rows(), V = tensors.classes();
  if (N == 0) return;
  torch::stable::accelerator::DeviceGuard guard(tensors.student.get_device_index());
  const cudaStream_t stream = current_stream(tensors.student);
  for_type(tensors.student, [&](auto element) {
    using T = decltype(element);
    using F = typename Accumulate<T>::type;
    const RowStatsArguments<T, F> arguments{static_cast<const T*>(tensors.student.const_data_ptr()),
                                            static_cast<const T*>(tensors.teacher_data()),
                                            tensors.label_data(),
                                            static_cast<F*>(tensors.stats.mutable_data_ptr()),
                                            tensors.argmax.mutable_data_ptr<int64_t>(),
                                            N,
                                            V,
                                            tensors.student.stride(0),
                                            tensors.teacher_stride(),
                                            tensors.first_class,
                                            tensors.class_count,
                                            tensors.ignore_index,
                                            F(tensors.temperature)};
    if (arguments.teacher == nullptr) row_stats_kernel<T, F><<<stats_blocks(N), stats_threads(V), 0, stream>>>(arguments);
    else row_stats_of_both_kernel<T, F><<<stats_blocks(N), stats_threads(V), 0, stream>>>(arguments);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CUDA, m) { KDAIF_REGISTER_ROW_STATS(m, run) }
