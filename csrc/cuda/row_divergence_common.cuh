// What the kernels of row_divergence have in common: reading logits, labels that are not legal, the softmax of a row
// that is read once. No torch here, so that the same source can be compiled and run by a test without a GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "common/half.h"
#include "common/row_divergence_args.h"
#include "cuda/block.cuh"
#include "cuda/row_divergence_plan.h"

namespace kdaif {

template <class T> struct ElementOf;
template <> struct ElementOf<float> { static constexpr Element value = FLOAT32; };
template <> struct ElementOf<double> { static constexpr Element value = FLOAT64; };
template <> struct ElementOf<bfloat16> { static constexpr Element value = BFLOAT16; };
template <> struct ElementOf<float16> { static constexpr Element value = FLOAT16; };

template <class F> __device__ __forceinline__ F lowest() { return -F(INFINITY); }

// Where a row begins. Rows may lie so far apart that 32 bits do not count their elements.
template <class T>
KDAIF_SHARED T* row_at(T* base, int64_t row, int64_t stride) { return base + row * stride; }

// Logit i in the accumulation type. The element's type is looked up at run time, the same way in all threads: one
// kernel instead of three.
template <class F>
__device__ __forceinline__ F load(const void* x, Element element, int64_t i) {
  if constexpr (sizeof(F) == 8) return static_cast<const F*>(x)[i];
  if (element == BFLOAT16) return F(widen(static_cast<const bfloat16*>(x)[i]));
  if (element == FLOAT16) return F(widen(static_cast<const float16*>(x)[i]));
  return static_cast<const F*>(x)[i];
}

template <class F>
__device__ __forceinline__ void store(F value, void* x, Element element, int64_t i) {
  if (sizeof(F) == 8 || element == FLOAT32) static_cast<F*>(x)[i] = value;
  else if (element == BFLOAT16) narrow(static_cast<float>(value), static_cast<bfloat16*>(x)[i]);
  else narrow(static_cast<float>(value), static_cast<float16*>(x)[i]);
}

// Out of line and never back: so they cost the kernels no registers.
[[noreturn]] inline __device__ __noinline__ void refuse_label(int64_t row, int64_t label, int64_t V) {
  printf("row_divergence: labels[%lld] = %lld, expected 0 <= label < %lld\n", static_cast<long long>(row),
         static_cast<long long>(label), static_cast<long long>(V));
  __trap();
  __builtin_unreachable();
}
[[noreturn]] inline __device__ __noinline__ void refuse_index(int64_t row, int64_t i, int64_t index, int64_t C) {
  printf("row_divergence: indices[%lld, %lld] = %lld, expected 0 <= index < %lld\n", static_cast<long long>(row),
         static_cast<long long>(i), static_cast<long long>(index), static_cast<long long>(C));
  __trap();
  __builtin_unreachable();
}

struct RowLabel {
  int64_t label = -1;  // -1 where there are no labels
  bool ignored = false, legal = true;
};

// A label that is not legal ends the kernel, or, without the check, makes its row NaN.
__device__ __forceinline__ RowLabel row_label(const RowDivergence& d, int64_t row, bool check) {
  RowLabel y;
  if (d.labels == nullptr) return y;
  y.label = d.labels[row];
  y.ignored = y.label == d.ignore_index;
  y.legal = y.ignored || (0 <= y.label && y.label < d.V);
  if (check && !y.legal) refuse_label(row, y.label, d.V);
  return y;
}

// Maximum and sum of exp((x - max) / T) of the logits seen so far. A NaN among them makes the sum NaN.
template <class F>
struct Softmax {
  F max = lowest<F>(), sum = 0, log_sum = 0;

  // inverse is 1 / T. Before the first finite logit the maximum is -inf, and -inf - -inf must not be formed.
  __device__ __forceinline__ void add(F x, F inverse) {
    if (x > max) {
      sum = sum * exp_of((max - x) * inverse) + 1;
      max = x;
    } else if (x != lowest<F>()) {
      sum += exp_of((x - max) * inverse);
    }
  }

  // Of all threads of the block.
  __device__ __forceinline__ void join(F inverse, F* memory) {
    const F all = block_reduce<Max>(max, memory);
    const F factor = max == lowest<F>() ? F(1) : exp_of((max - all) * inverse);
    sum = block_reduce<Sum>(sum * factor, memory);
    max = all;
    log_sum = log_of(sum);
  }

  __device__ __forceinline__ F log_probability(F x, F inverse) const { return (x - max) * inverse - log_sum; }
};

}  // namespace kdaif
