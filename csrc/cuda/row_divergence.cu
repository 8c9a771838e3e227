// row_divergence, its gradient and its curvature products on the GPU: launches and registration. The kernels are in
// row_divergence*.cuh, the definition in kdaif_fast/reference/row_divergence.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <cstring>

#include "common/row_divergence_tensors.h"
#include "cuda/row_divergence.cuh"

namespace {

using namespace kdaif;

// Not torch::stable's getCurrentStream().id(): before torch 2.13 that is no handle.
cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool checks_labels() {
  static const bool checks = [] {
    const char* value = std::getenv("KDAIF_CHECK_LABELS");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return checks;
}

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return FLOAT64;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    default: return FLOAT32;
  }
}

// Calls body with a value of the accumulation type.
template <class Body>
void for_accumulation(Element element, Body body) {
  if (element == FLOAT64) body(double());
  else body(float());
}

void run(const RowDivergence& d, const Tensor& student, const Tensor* loss, const Tensor* grad) {
  if (d.N == 0) return;
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const cudaStream_t stream = current_stream(student);
  const Element element = element_of(student);
  void* losses = loss ? loss->mutable_data_ptr() : nullptr;
  void* grads = grad ? grad->mutable_data_ptr() : nullptr;
  const Launch launch = general_launch(d.N, d.V);
  for_accumulation(element, [&](auto zero) {
    using F = decltype(zero);
    for_kind(d.kind, [&](auto kind) {
      row_divergence_kernel<kind(), F><<<launch.blocks, launch.threads, 0, stream>>>(d, element, checks_labels(),
                                                                                   static_cast<F*>(losses), grads);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void run_hvp(const RowDivergence& d, const Tensor& student, const Tensor& tangents, bool gauss_newton,
             const Tensor& out) {
  const Tangents t{tangents.const_data_ptr(), out.mutable_data_ptr(), tangents.size(0), tangents.stride(0),
                   tangents.stride(1)};
  if (d.N == 0 || t.K == 0) return;
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const cudaStream_t stream = current_stream(student);
  const Element element = element_of(student);
  const Launch launch = general_launch(d.N, d.V);
  for_accumulation(element, [&](auto zero) {
    using F = decltype(zero);
    for_kind(d.kind, [&](auto kind) {
      row_divergence_hvp_kernel<kind(), F><<<launch.blocks, launch.threads, 0, stream>>>(d, element, checks_labels(),
                                                                                       gauss_newton, t);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CUDA, m) { KDAIF_REGISTER_ROW_DIVERGENCE(m, run, run_hvp) }
