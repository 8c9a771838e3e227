// kd_loss, its gradient and its Hessian-vector product on the GPU: checks, launches and registration. The kernels are
// in kd_loss.cuh, the definition in kdaif_fast/reference/kd_loss.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/kd_loss_ops.h"
#include "cuda/kd_loss.cuh"

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
    default: STD_TORCH_CHECK(false, "kd_loss: logits must be float32, float64, bfloat16 or float16");
  }
}

void run(const Tensor& student_, const Tensor& teacher_, const Tensor& labels_, const Tensor& scale_,
         double temperature, double alpha, const Tensor* loss, const Tensor* grad) {
  const Tensor student = with_dense_rows(student_), teacher = with_dense_rows(teacher_);
  const Tensor labels = torch::stable::contiguous(labels_), scale = torch::stable::contiguous(scale_);
  const int64_t N = student.size(0), V = student.size(1);
  if (N == 0) return;
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  for_type(student, [&](auto element) {
    using T = decltype(element);
    using F = typename Accumulate<T>::type;
    kd_loss_kernel<T, F><<<blocks_for(N), threads_for(V), 0, current_stream(student)>>>(
        static_cast<const T*>(student.const_data_ptr()), static_cast<const T*>(teacher.const_data_ptr()),
        labels.const_data_ptr<int64_t>(), static_cast<const F*>(scale.const_data_ptr()),
        loss ? static_cast<F*>(loss->mutable_data_ptr()) : nullptr,
        grad ? static_cast<T*>(grad->mutable_data_ptr()) : nullptr, N, V, student.stride(0), teacher.stride(0),
        F(temperature), F(alpha));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void run_hvp(const Tensor& scale_, const Tensor& tangent_, const Tensor& student_, double temperature, double alpha,
             const Tensor& out) {
  const Tensor student = with_dense_rows(student_), tangent = with_dense_rows(tangent_);
  const Tensor scale = torch::stable::contiguous(scale_);
  const int64_t N = student.size(0), V = student.size(1);
  if (N == 0) return;
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  for_type(student, [&](auto element) {
    using T = decltype(element);
    using F = typename Accumulate<T>::type;
    kd_loss_hvp_kernel<T, F><<<blocks_for(N), threads_for(V), 0, current_stream(student)>>>(
        static_cast<const T*>(student.const_data_ptr()), static_cast<const T*>(tangent.const_data_ptr()),
        static_cast<const F*>(scale.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), N, V,
        student.stride(0), tangent.stride(0), F(temperature), F(alpha));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CUDA, m) { KDAIF_REGISTER_KD_LOSS(m, run, run_hvp) }
