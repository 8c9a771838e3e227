// kd_loss over rows on the GPU: one block a row, three passes over it (maxima, sums, gradient); formulas in
// common/kd_loss_math.h. No torch here, so that the same source can be compiled and run by a test without a GPU.
//
// Floor: 2 reads and 1 write of V elements. The second and third pass find rows of up to some 64 KiB in the caches.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/half.h"
#include "common/kd_loss_math.h"
#include "cuda/block.cuh"

namespace kdaif {

constexpr int MAX_THREADS = 512;

// Threads for rows of V elements: enough for some elements each, in whole warps.
inline int threads_for(int64_t V) {
  int threads = WARP;
  while (threads < MAX_THREADS && threads * 4 < V) threads *= 2;
  return threads;
}

// Rows beyond this many are taken in turns.
inline unsigned blocks_for(int64_t N) { return static_cast<unsigned>(N < 0x7fffffff ? N : 0x7fffffff); }

template <class F>
__device__ __forceinline__ F lowest() { return -F(INFINITY); }

// loss and grad may be null. scale multiplies the row's loss and gradient. A label outside [0, V) makes its row NaN.
template <class T, class F>
__global__ void __launch_bounds__(MAX_THREADS)
kd_loss_kernel(const T* __restrict__ student,       // [N, V], student_stride from row to row
               const T* __restrict__ teacher,       // [N, V], teacher_stride from row to row; not read if alpha == 1
               const int64_t* __restrict__ labels,  // [N]
               const F* __restrict__ scale,         // [N]
               F* __restrict__ loss,                // [N]
               T* __restrict__ grad,                // [N, V]
               int64_t N, int64_t V, int64_t student_stride, int64_t teacher_stride, F temperature, F alpha) {
  __shared__ F memory[MAX_THREADS / WARP];
  const bool ce = alpha != 0, kl = alpha != 1;
  const F inverse = 1 / temperature;
  for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
    const T* s = student + row * student_stride;
    const T* t = teacher + row * teacher_stride;
    F max_s = lowest<F>(), max_t = lowest<F>();
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      max_s = Max::join(max_s, widen(s[v]));
      if (kl) max_t = Max::join(max_t, widen(t[v]));
    }
    max_s = block_reduce<Max>(max_s, memory);
    if (kl) max_t = block_reduce<Max>(max_t, memory);

    KdSums<F> sums;
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      const F x = widen(s[v]) - max_s;
      if (ce) sums.student_1 += std::exp(x);
      if (kl) {
        const F log_q = x * inverse, log_p = (widen(t[v]) - max_t) * inverse, p = std::exp(log_p);
        sums.student_T += std::exp(log_q);
        sums.teacher_T += p;
        // A class that the teacher excludes contributes nothing, even where the student excludes it too.
        sums.cross += p > 0 ? p * (log_p - log_q) : p;
      }
    }
    if (ce) sums.student_1 = block_reduce<Sum>(sums.student_1, memory);
    if (kl) {
      sums.student_T = block_reduce<Sum>(sums.student_T, memory);
      sums.teacher_T = block_reduce<Sum>(sums.teacher_T, memory);
      sums.cross = block_reduce<Sum>(sums.cross, memory);
    }

    const int64_t label = labels[row];
    const bool legal = 0 <= label && label < V;
    const F w = legal ? scale[row] : F(NAN);
    if (loss != nullptr && threadIdx.x == 0) {
      const F label_logit = legal ? widen(s[label]) - max_s : F(0);
      loss[row] = w * kd_row_loss(sums, label_logit, temperature, alpha);
    }
    if (grad != nullptr) {
      const KdGradFactors<F> factors = kd_row_grad_factors(sums, w, temperature, alpha);
      T* out = grad + row * V;
      for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
        const F x = widen(s[v]) - max_s;
        F g = 0;
        if (ce) g += factors.student_1 * std::exp(x);
        if (kl) g += factors.student_T * std::exp(x * inverse) - factors.teacher_T * std::exp((widen(t[v]) - max_t) * inverse);
        if (v == label) g -= w * alpha;
        narrow(g, out[v]);
      }
    }
  }
}

template <class T, class F>
__global__ void __launch_bounds__(MAX_THREADS)
kd_loss_hvp_kernel(const T* __restrict__ student,  // [N, V]
                   const T* __restrict__ tangent,  // [N, V]
                   const F* __restrict__ scale,    // [N]
                   T* __restrict__ out,            // [N, V]
                   int64_t N, int64_t V, int64_t student_stride, int64_t tangent_stride, F temperature, F alpha) {
  __shared__ F memory[MAX_THREADS / WARP];
  const bool ce = alpha != 0, kl = alpha != 1;
  const F inverse = 1 / temperature;
  for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
    const T* s = student + row * student_stride;
    const T* u = tangent + row * tangent_stride;
    F max_s = lowest<F>();
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) max_s = Max::join(max_s, widen(s[v]));
    max_s = block_reduce<Max>(max_s, memory);

    KdHvpSums<F> sums;
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      const F x = widen(s[v]) - max_s, along = widen(u[v]);
      if (ce) {
        const F e = std::exp(x);
        sums.student_1 += e;
        sums.tangent_1 += e * along;
      }
      if (kl) {
        const F e = std::exp(x * inverse);
        sums.student_T += e;
        sums.tangent_T += e * along;
      }
    }
    if (ce) {
      sums.student_1 = block_reduce<Sum>(sums.student_1, memory);
      sums.tangent_1 = block_reduce<Sum>(sums.tangent_1, memory);
    }
    if (kl) {
      sums.student_T = block_reduce<Sum>(sums.student_T, memory);
      sums.tangent_T = block_reduce<Sum>(sums.tangent_T, memory);
    }
    const KdHvpFactors<F> f = kd_row_hvp_factors(sums, scale[row], alpha);
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      const F x = widen(s[v]) - max_s, along = widen(u[v]);
      F h = 0;
      if (ce) h += f.student_1 * std::exp(x) * (along - f.mean_1);
      if (kl) h += f.student_T * std::exp(x * inverse) * (along - f.mean_T);
      narrow(h, out[row * V + v]);
    }
  }
}

}  // namespace kdaif
