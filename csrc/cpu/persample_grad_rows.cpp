// persample_grad over samples, and persample_dot where gradients are the cheaper way; compiled once per instruction set, as
// row_stats_rows.cpp.
//
// Floor: N T O I multiply-adds and N O I elements written, which is all for T = 1. float32, into memory that is there:
//   T = 1, against filling it with a constant, and torch.mul(out=): [256, 784 -> 512] 0.88 and 0.73, [256, 512 -> 512] 0.90
//   and 0.76. Into fresh memory 4.1 and 5.2 times as fast as torch.bmm, which gets it in pages of 4 KiB.
//   N = 32, T = 64, against torch.bmm(out=): 256 -> 768 0.79   256 -> 1024 0.77   1024 -> 256 0.75; with the dots of one
//   direction 0.97, 1.07, 0.96. Dots alone, against the layer's weight gradient: K = 1 0.95 to 1.03, K = 4 1.3 to 1.5.
#include "cpu/vector.h"

#include "cpu/persample_grad_rows.h"

#include "cpu/for_type.h"
#include "cpu/gradient_tiles.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

template <class F, class T> KDAIF_INLINE void put_tile(const F* tile, const Place& place, T* grad, int64_t stride) {
  T* to = grad + place.row * stride + place.column;
  if (place.is_whole()) {
    for (int64_t m = 0; m < PANEL; ++m) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < PANEL; v += LANES<F>) store(load(tile + m * PANEL + v), to + m * stride + v);
    }
  } else {
    for (int64_t m = 0; m < place.rows; ++m)
      for_vectors<F>(place.columns, [&](int64_t v, auto part) __attribute__((always_inline)) {
        part.put(load(tile + m * PANEL + v), to + m * stride + v);
      });
  }
}

template <class T> void grads_of(const PersampleGrad& g, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const LinearLayer& layer = g.layer;
  const int64_t I = layer.inputs.width, O = layer.output_grads.width;
  GradientTiles<T> tiles(layer);
  Scratch<F> buffer(1, PANEL * PANEL);
  F* tile = buffer.row(0);
  for (int64_t n = begin; n < end; ++n) {
    T* grad = g.grads == nullptr ? nullptr : static_cast<T*>(g.grads) + n * g.sample_stride;
    F* dots = static_cast<F*>(g.dots) + n * g.K;
    for (int64_t k = 0; k < g.K; ++k) dots[k] = 0;
    tiles.for_sample(n, [&](const F* left, const F* right, const Place& place) __attribute__((always_inline)) {
      for_tile<F>(left, right, layer.T, [&](int64_t m, int64_t v, Vec<F> sums) __attribute__((always_inline)) {
        store(sums, tile + m * PANEL + v * LANES<F>);
      });
      if (grad != nullptr) put_tile(tile, place, grad, I);
      for (int64_t k = 0; k < g.K; ++k)
        dots[k] += tile_dot(tile, place, static_cast<const F*>(g.directions) + k * O * I, I);
    });
  }
}

// T = 1: b_o a for every o. The row a stays in L1; what is paid for is the writing.
template <class T, class Write>
KDAIF_INLINE void for_outer_rows(const PersampleGrad& g, int64_t begin, int64_t end, Write write) {
  const int64_t I = g.layer.inputs.width, O = g.layer.output_grads.width;
  for (int64_t n = begin; n < end; ++n) {
    const T *a = g.layer.inputs.at<T>(n, 0), *b = g.layer.output_grads.at<T>(n, 0);
    T* to = static_cast<T*>(g.grads) + n * g.sample_stride;
    for (int64_t o = 0; o < O; ++o) write(a, widen(b[o]), to + o * I);
  }
}

template <class T> void outer_products(const PersampleGrad& g, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const int64_t I = g.layer.inputs.width;
  for_outer_rows<T>(g, begin, end, [&](const T* a, F b, T* to) __attribute__((always_inline)) {
    for_vectors<F>(I, [&](int64_t i, auto part) __attribute__((always_inline)) { part.put(part.get(a + i, F(0)) * b, to + i); });
  });
}

#if defined(__AVX512F__)
// Past the caches, which would read every line before they write it. `true` if that pays and can be done: more than the
// caches hold, and whole lines only.
template <class F> KDAIF_INLINE bool streams(const PersampleGrad& g) {
  const int64_t I = g.layer.inputs.width, bytes = g.layer.N * g.layer.output_grads.width * I * int64_t(sizeof(F));
  const bool whole = I % LANES<F> == 0 && g.sample_stride % LANES<F> == 0 && reinterpret_cast<uintptr_t>(g.grads) % 64 == 0;
  return whole && bytes > (int64_t{32} << 20);
}
template <class F> void stream_outer_products(const PersampleGrad& g, int64_t begin, int64_t end) {
  const int64_t I = g.layer.inputs.width;
  for_outer_rows<F>(g, begin, end, [&](const F* a, F b, F* to) __attribute__((always_inline)) {
    for (int64_t i = 0; i < I; i += LANES<F>) {
      const Vec<F> x = load(a + i) * b;
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), (__m512i)x);
    }
  });
  _mm_sfence();  // such stores are seen in no order by other threads otherwise
}
#endif

}  // namespace

void persample_grad_rows(const PersampleGrad& g, int64_t begin, int64_t end) {
  for_type(g.layer.type, [&](auto element) { grads_of<decltype(element)>(g, begin, end); });
}

void outer_product_rows(const PersampleGrad& g, int64_t begin, int64_t end) {
  for_type(g.layer.type, [&](auto element) {
    using T = decltype(element);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, typename Accumulate<T>::type>)
      if (streams<T>(g)) return stream_outer_products<T>(g, begin, end);
#endif
    outer_products<T>(g, begin, end);
  });
}

}  // namespace kdaif::KDAIF_LEVEL
