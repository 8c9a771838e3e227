// persample_norm over samples; compiled once per instruction set, as row_stats_rows.cpp.
//
// Floor of T = 1: one pass over a and b; otherwise T (T + 16) (I + O) / 2 multiply-adds by Gram matrices, T I O by the
// gradient. Both run at the same speed, so that operations decide. In units of the layer's weight gradient by MKL, float32,
// N = 32, T = 64: 256 -> 256 0.44   256 -> 768 0.26   256 -> 1024 0.24   1024 -> 256 0.24; 0.25 for those four and
// 256 -> 1000 together, where torch.bmm of whole Gram matrices takes 0.42.
#include "cpu/vector.h"

#include "cpu/persample_norm_rows.h"

#include "cpu/for_type.h"
#include "cpu/gradient_tiles.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

template <class F, class T> KDAIF_INLINE F squared_length(const T* x, int64_t count) {
  Vec<F> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES<F> <= count; i += 4 * LANES<F>) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Vec<F> y = load(x + i + j * LANES<F>);
      sums[j] += y * y;
    }
  }
  for_vectors<F>(count - i, [&](int64_t v, auto part) __attribute__((always_inline)) {
    const Vec<F> y = part.get(x + i + v, F(0));
    sums[0] += y * y;
  });
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T> void by_lengths(const PersampleNorm& x, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const LinearLayer& layer = x.layer;
  for (int64_t n = begin; n < end; ++n)
    static_cast<F*>(x.norms)[n] = squared_length<F>(layer.inputs.at<T>(n, 0), layer.inputs.width) *
                                  squared_length<F>(layer.output_grads.at<T>(n, 0), layer.output_grads.width);
}

template <class T> void by_gradient(const PersampleNorm& x, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  GradientTiles<T> tiles(x.layer);
  for (int64_t n = begin; n < end; ++n) {
    F total = 0;
    tiles.for_sample(n, [&](const F* left, const F* right, const Place&) __attribute__((always_inline)) {
      Vec<F> squares{};  // a tile's elements outside of G are zero
      for_tile<F>(left, right, x.layer.T, [&](int64_t, int64_t, Vec<F> sums) __attribute__((always_inline)) {
        squares += sums * sums;
      });
      total += sum_of(squares);
    });
    static_cast<F*>(x.norms)[n] = total;
  }
}

// Packs a sample's positions, 16 a panel.
template <class T, class F>
KDAIF_INLINE void pack_positions(const Positions& x, int64_t sample, int64_t count, Scratch<F>& panels) {
  for (int64_t p = 0; p < panels_of(count); ++p)
    pack_rows<F>([&](int64_t m) __attribute__((always_inline)) { return x.at<T>(sample, p * PANEL + m); },
                 std::min(PANEL, count - p * PANEL), 0, x.width, panels.row(p));
}

// Both Gram matrices, tile by tile, on and above the diagonal; the tiles above it count for those below.
template <class T> void by_gram(const PersampleNorm& x, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const LinearLayer& layer = x.layer;
  const int64_t I = layer.inputs.width, O = layer.output_grads.width, panels = panels_of(layer.T);
  Scratch<F> inputs(panels, I * PANEL), grads(panels, O * PANEL), buffer(1, PANEL * PANEL);
  F* tile = buffer.row(0);
  for (int64_t n = begin; n < end; ++n) {
    pack_positions<T>(layer.inputs, n, layer.T, inputs);
    pack_positions<T>(layer.output_grads, n, layer.T, grads);
    F diagonal = 0, above = 0;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t q = p; q < panels; ++q) {
        Vec<F> products{};
        for_tile<F>(inputs.row(p), inputs.row(q), I, [&](int64_t m, int64_t v, Vec<F> sums) __attribute__((always_inline)) {
          store(sums, tile + m * PANEL + v * LANES<F>);
        });
        for_tile<F>(grads.row(p), grads.row(q), O, [&](int64_t m, int64_t v, Vec<F> sums) __attribute__((always_inline)) {
          products += load(tile + m * PANEL + v * LANES<F>) * sums;
        });
        (p == q ? diagonal : above) += sum_of(products);
      }
    const F norm = diagonal + 2 * above;
    static_cast<F*>(x.norms)[n] = norm < 0 ? F(0) : norm;  // where positions cancel, rounding may be all that is left
  }
}

}  // namespace

void persample_norm_rows(const PersampleNorm& x, int64_t begin, int64_t end) {
  for_type(x.layer.type, [&](auto element) {
    using T = decltype(element);
    switch (x.by) {
      case NormBy::lengths: by_lengths<T>(x, begin, end); break;
      case NormBy::gram: by_gram<T>(x, begin, end); break;
      case NormBy::gradient: by_gradient<T>(x, begin, end); break;
    }
  });
}

}  // namespace kdaif::KDAIF_LEVEL
