// row_stats over rows on the GPU: one block a row, two passes over it (maxima and arg-maxima; sums), and a third where a
// divergence is small; formulas in common/row_stats_math.h. No torch here, so that the same source can be compiled and run
// by a test without a GPU.
//
// Floor: 2 reads of V elements. The second pass finds rows of up to some 64 KiB in the caches.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/half.h"
#include "common/row_stats_math.h"
#include "cuda/block.cuh"

namespace kdaif {

constexpr int STATS_THREADS = 512;

// Threads for rows of V elements: enough for some elements each, in whole warps.
inline int stats_threads(int64_t V) {
  int threads = WARP;
  while (threads < STATS_THREADS && threads * 4 < V) threads *= 2;
  return threads;
}

// Rows beyond this many are taken in turns.
inline unsigned stats_blocks(int64_t N) { return static_cast<unsigned>(N < 0x7fffffff ? N : 0x7fffffff); }

// Statistics are F, the accumulation type of T.
template <class T, class F>
struct RowStatsArguments {
  const T* student;       // [N, V], student_stride from row to row
  const T* teacher;       // [N, V], or null
  const int64_t* labels;  // [N], or null
  F* stats;               // [STATS_ALONE or STATS_OF_BOTH, N]
  int64_t* argmax;        // [1 or 2, N]
  int64_t N, V, student_stride, teacher_stride;
  int64_t first_class, class_count;  // the slice whose mass is wanted; class_count 0: none
  int64_t ignore_index;
  F temperature;
};

struct Least {
  static __device__ __forceinline__ int64_t join(int64_t a, int64_t b) { return b < a ? b : a; }
};
// The larger, and NaN before everything else.
struct MaxOrNan {
  template <class F> static __device__ __forceinline__ F join(F a, F b) { return b > a || b != b ? b : a; }
};

// What the reductions of a block need of shared memory.
template <class F>
struct StatsMemory {
  F values[STATS_THREADS / WARP];
  int64_t indices[STATS_THREADS / WARP];
};

template <class F>
struct Top {
  F largest;
  int64_t index;  // the lowest that has it
};

template <class T, class F>
__device__ __forceinline__ Top<F> row_top(const T* x, int64_t V, StatsMemory<F>& memory) {
  F largest = -F(INFINITY);
  int64_t index = threadIdx.x < V ? threadIdx.x : V;
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
    const F value = widen(x[v]);
    if (value > largest || (value != value && largest == largest)) largest = value, index = v;
  }
  const F all = block_reduce<MaxOrNan>(largest, memory.values);
  const bool has_it = largest == all || (largest != largest && all != all);
  return {all, block_reduce<Least>(has_it ? index : V, memory.indices)};
}

// One network's sums, of a thread, then of the block.
template <class F>
struct SideSums {
  StatSums<F> sums;
  F largest_other = -F(INFINITY);  // logit of all classes but one

  // x is the logit relative to the largest, over T; e its exponential.
  __device__ __forceinline__ void add(F logit, F x, F e, bool is_other, bool in_slice) {
    sums.total += e;
    // A class without probability contributes nothing, even where its logit is -inf; NaN stays.
    sums.mean += e == 0 ? F(0) : e * x;
    if (in_slice) sums.mass += e;
    if (is_other) largest_other = Max::join(largest_other, logit);
  }
  __device__ __forceinline__ void join(StatsMemory<F>& memory) {
    sums.total = block_reduce<Sum>(sums.total, memory.values);
    sums.mean = block_reduce<Sum>(sums.mean, memory.values);
    sums.mass = block_reduce<Sum>(sums.mass, memory.values);
    largest_other = block_reduce<Max>(largest_other, memory.values);
  }
};

// The label of a row, and the class whose margin is wanted.
struct RowLabelOfStats {
  bool labels, known;
  int64_t label;
  __device__ __forceinline__ int64_t margin_of(int64_t argmax) const { return known ? label : argmax; }
};

template <class T, class F>
__device__ __forceinline__ RowLabelOfStats label_of(const RowStatsArguments<T, F>& a, int64_t row) {
  if (a.labels == nullptr) return {false, false, 0};
  const int64_t label = a.labels[row];
  return {true, label != a.ignore_index && 0 <= label && label < a.V, label};
}

template <class T, class F>
__device__ __forceinline__ void write_side(const RowStatsArguments<T, F>& a, const T* x, const Top<F>& top, const SideSums<F>& side,
                                           const RowLabelOfStats& y, int64_t row, int which) {
  const StatLogits<F> logits{top.largest, widen(x[y.margin_of(top.index)]), side.largest_other};
  a.argmax[which * a.N + row] = top.index;
  write_stats(side.sums, logits, a.temperature, {y.labels, y.known, a.class_count > 0}, a.stats + which * STATS_ALONE * a.N + row, a.N);
}

// Divergences of nearly equal distributions, term by term: none is negative, and none is a difference of large numbers.
template <class T, class F>
__device__ __forceinline__ StatDivergences<F> small_divergences(const T* s, const T* t, F max_s, F max_t, F inverse, F student,
                                                                F teacher, int64_t V, F* memory) {
  const F log_ratio = std::log(student) - std::log(teacher), p_scale = 1 / teacher, q_scale = 1 / student;
  F forward = 0, reverse = 0;
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
    const F x = (widen(s[v]) - max_s) * inverse, log_p = (widen(t[v]) - max_t) * inverse, log_q = x - log_ratio;
    const F p = std::exp(log_p) * p_scale, q = std::exp(x) * q_scale;
    forward += divergence<F>(p, log_p, q, log_q, true);
    reverse += divergence<F>(q, log_q, p, log_p, true);
  }
  forward = block_reduce<Sum>(forward, memory);
  return {forward, block_reduce<Sum>(reverse, memory)};
}

// A label outside [0, V) that is not ignore_index makes NaN of what depends on it, like an ignored one.
template <class T, class F>
__global__ void __launch_bounds__(STATS_THREADS) row_stats_kernel(const RowStatsArguments<T, F> a) {
  __shared__ StatsMemory<F> memory;
  const F inverse = 1 / a.temperature;
  for (int64_t row = blockIdx.x; row < a.N; row += gridDim.x) {
    const T* s = a.student + row * a.student_stride;
    const RowLabelOfStats y = label_of(a, row);
    const Top<F> top = row_top<T, F>(s, a.V, memory);
    const int64_t of = y.margin_of(top.index);
    SideSums<F> student;
    for (int64_t v = threadIdx.x; v < a.V; v += blockDim.x) {
      const F logit = widen(s[v]), x = (logit - top.largest) * inverse;
      student.add(logit, x, std::exp(x), v != of, v >= a.first_class && v - a.first_class < a.class_count);
    }
    student.join(memory);
    if (threadIdx.x == 0) write_side(a, s, top, student, y, row, 0);
  }
}

template <class T, class F>
__global__ void __launch_bounds__(STATS_THREADS) row_stats_of_both_kernel(const RowStatsArguments<T, F> a) {
  __shared__ StatsMemory<F> memory;
  const F inverse = 1 / a.temperature;
  for (int64_t row = blockIdx.x; row < a.N; row += gridDim.x) {
    const T *s = a.student + row * a.student_stride, *t = a.teacher + row * a.teacher_stride;
    const RowLabelOfStats y = label_of(a, row);
    const Top<F> top_s = row_top<T, F>(s, a.V, memory), top_t = row_top<T, F>(t, a.V, memory);
    const int64_t of_s = y.margin_of(top_s.index), of_t = y.margin_of(top_t.index);
    SideSums<F> student, teacher;
    F forward = 0, reverse = 0;
    for (int64_t v = threadIdx.x; v < a.V; v += blockDim.x) {
      const bool in_slice = v >= a.first_class && v - a.first_class < a.class_count;
      const F logit_s = widen(s[v]), log_q = (logit_s - top_s.largest) * inverse, q = std::exp(log_q);
      const F logit_t = widen(t[v]), log_p = (logit_t - top_t.largest) * inverse, p = std::exp(log_p);
      student.add(logit_s, log_q, q, v != of_s, in_slice);
      teacher.add(logit_t, log_p, p, v != of_t, in_slice);
      forward += p == 0 ? F(0) : p * (log_p - log_q);
      reverse += q == 0 ? F(0) : q * (log_q - log_p);
    }
    student.join(memory);
    teacher.join(memory);
    forward = block_reduce<Sum>(forward, memory.values);
    reverse = block_reduce<Sum>(reverse, memory.values);
    StatDivergences<F> kl = stat_divergences(forward, reverse, student.sums.total, teacher.sums.total);
    // The same in all threads, so that all or none come to the barriers within.
    if (one_is_small(kl))
      kl = small_divergences(s, t, top_s.largest, top_t.largest, inverse, student.sums.total, teacher.sums.total, a.V, memory.values);
    if (threadIdx.x == 0) {
      write_side(a, s, top_s, student, y, row, 0);
      write_side(a, t, top_t, teacher, y, row, 1);
      a.stats[STAT_FORWARD_KL * a.N + row] = lifted(kl.forward);
      a.stats[STAT_REVERSE_KL * a.N + row] = lifted(kl.reverse);
    }
  }
}

}  // namespace kdaif
