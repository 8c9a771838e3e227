// persample_group_norm over channels of samples; compiled once per instruction set (KDAIF_LEVEL), so nothing here may
// have external linkage but the function at the end, and no library template may be instantiated.
//
// Floor: inputs and output gradients read once. Two sums of each kind, so that additions do not wait for each other.
//
// Measured as in persample_layer_norm_rows.cpp: [16, 256, 1024] float32 1.47 ms, two plain sums 1.71, the definition 29;
// [64, 64, 256] 0.33, 0.35, 2.0; [32, 64, 64], whose rows are four vectors, 0.046, 0.023, 0.16; [16, 256, 1024] bfloat16
// 0.72, 0.85, 52.
#include "cpu/vector.h"

#include "cpu/persample_group_norm_rows.h"

#include "cpu/for_type.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

template <class F> struct AffineGrads { F weight, bias; };

// Centred before it is multiplied: sum b x - mean sum b would lose the digits that a large mean has in common.
template <class F, class T> KDAIF_INLINE AffineGrads<F> affine_grads(const T* x, const T* b, int64_t count, F mean, F rstd) {
  constexpr int64_t L = LANES<F>;
  Vec<F> weight[2] = {}, bias[2] = {};
  int64_t l = 0;
  for (; l + 2 * L <= count; l += 2 * L) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec<F> grad = load(b + l + i * L);
      weight[i] += grad * (load(x + l + i * L) - mean), bias[i] += grad;
    }
  }
  for_vectors<F>(count - l, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> grad = part.get(b + l + v, F(0));
    weight[0] += grad * (part.get(x + l + v, F(0)) - mean), bias[0] += grad;
  });
  return {sum_of(weight[0] + weight[1]) * rstd, sum_of(bias[0] + bias[1])};
}

}  // namespace

void persample_group_norm_rows(const PersampleGroupNorm& norm, ElementType type, int64_t begin, int64_t end) {
  for_type(type, [&](auto element) __attribute__((always_inline)) {
    using T = decltype(element);
    using F = typename Accumulate<T>::type;
    const int64_t width = norm.channels / norm.groups;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / norm.channels, channel = task % norm.channels, group = sample * norm.groups + channel / width;
      const auto grads = affine_grads<F>(
          static_cast<const T*>(norm.inputs) + sample * norm.input_sample + channel * norm.input_channel,
          static_cast<const T*>(norm.output_grads) + sample * norm.grad_sample + channel * norm.grad_channel, norm.positions,
          static_cast<const F*>(norm.mean)[group], static_cast<const F*>(norm.rstd)[group]);
      static_cast<F*>(norm.weight_grads)[task] = grads.weight, static_cast<F*>(norm.bias_grads)[task] = grads.bias;
    }
  });
}

}  // namespace kdaif::KDAIF_LEVEL
