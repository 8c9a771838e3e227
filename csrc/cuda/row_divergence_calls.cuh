// Launches of row_divergence, one family of kernels a source file: nvcc then compiles them at the same time.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/row_divergence_plan.h"

namespace kdaif {

// Enqueues a kernel; what the launch functions of row_divergence_*launch.cuh call.
struct OnStream {
  cudaStream_t stream;

  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, Launch l, Arguments... arguments) const {
    // More shared memory than every GPU has must be asked for.
    if (l.shared > 0)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared_limit)));
    kernel<<<dim3(l.blocks, l.blocks_y), l.threads, l.shared, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// T is float, bfloat16 or float16; F float or double. `workspace` holds plan.workspace floats.
template <class T>
void enqueue_fast(const FastPlan& plan, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                  cudaStream_t stream);
template <class T>
void enqueue_fast_hvp(const FastHvpPlan& plan, const RowDivergence& d, bool check, const Tangents& t,
                      cudaStream_t stream);
template <class F>
void enqueue_general(const RowDivergence& d, Element element, bool check, F* loss, void* grad, cudaStream_t stream);
template <class F>
void enqueue_general_hvp(const RowDivergence& d, Element element, bool check, bool gauss_newton, const Tangents& t,
                         cudaStream_t stream);

}  // namespace kdaif
