// row_divergence, its gradient and its curvature products on the GPU: launches and registration. The kernels are in
// row_divergence*.cuh, the definition in kdaif_fast/reference/row_divergence.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/half.h"
#include "common/row_divergence_tensors.h"
#include "cuda/row_divergence_calls.cuh"

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

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// The current device's; asked for once.
Machine machine() {
  constexpr int known = 64;
  static std::atomic<int64_t> cache[known];  // multiprocessors and shared memory in one number; 0: not yet
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  int64_t packed = device < known ? cache[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    packed = int64_t(attribute(cudaDevAttrMultiProcessorCount, device)) << 32 |
             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (device < known) cache[device].store(packed, std::memory_order_relaxed);
  }
  return {packed >> 32, packed & 0xffffffff};
}

PlanWish wish() {
  static const PlanWish from_environment = plan_wish(std::getenv("KDAIF_ROW_PLAN"));
  return from_environment;
}

template <class T>
void run_fast(const RowDivergence& d, const Tensor& student, float* loss, T* grad) {
  const bool vectorised = is_vectorisable(d, grad, sizeof(T));
  const FastPlan plan =
      fast_plan(d.N, d.V, streams_of(d), grad != nullptr, sizeof(T), vectorised, machine(), wish());
  MaybeTensor workspace;
  if (plan.workspace > 0) workspace = torch::stable::new_empty(student, {plan.workspace}, ScalarType::Float);
  float* sums = workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
  enqueue_fast(plan, d, checks_labels(), loss, grad, sums, current_stream(student));
}

template <class T>
void run_fast_hvp(const RowDivergence& d, const Tensor& student, const Tangents& t) {
  const bool vectorised = is_vectorisable(d, t, sizeof(T));
  const FastHvpPlan plan = fast_hvp_plan(d.N, d.V, t.K, sizeof(T), vectorised, machine(), wish());
  enqueue_fast_hvp<T>(plan, d, checks_labels(), t, current_stream(student));
}

void run(const RowDivergence& d, const Tensor& student, const Tensor* loss_, const Tensor* grad_) {
  if (d.N == 0) return;
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  void* loss = loss_ ? loss_->mutable_data_ptr() : nullptr;
  void* grad = grad_ ? grad_->mutable_data_ptr() : nullptr;
  const Element element = element_of(student);
  const cudaStream_t stream = current_stream(student);
  if (element == FLOAT64)
    return enqueue_general(d, element, checks_labels(), static_cast<double*>(loss), grad, stream);
  float* losses = static_cast<float*>(loss);
  if (!is_common(d)) return enqueue_general(d, element, checks_labels(), losses, grad, stream);
  if (element == BFLOAT16) return run_fast(d, student, losses, static_cast<bfloat16*>(grad));
  if (element == FLOAT16) return run_fast(d, student, losses, static_cast<float16*>(grad));
  run_fast(d, student, losses, static_cast<float*>(grad));
}

void run_hvp(const RowDivergence& d, const Tensor& student, const Tensor& tangents, bool gauss_newton,
             const Tensor& out) {
  const Tangents t{tangents.const_data_ptr(), out.mutable_data_ptr(), tangents.size(0), tangents.stride(0),
                   tangents.stride(1)};
  if (d.N == 0 || t.K == 0) return;
  torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const Element element = element_of(student);
  const cudaStream_t stream = current_stream(student);
  if (element == FLOAT64)
    return enqueue_general_hvp<double>(d, element, checks_labels(), gauss_newton, t, stream);
  if (!is_common(d))
    return enqueue_general_hvp<float>(d, element, checks_labels(), gauss_newton, t, stream);
  if (element == BFLOAT16) return run_fast_hvp<bfloat16>(d, student, t);
  if (element == FLOAT16) return run_fast_hvp<float16>(d, student, t);
  run_fast_hvp<float>(d, student, t);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CUDA, m) { KDAIF_REGISTER_ROW_DIVERGENCE(m, run, run_hvp) }
