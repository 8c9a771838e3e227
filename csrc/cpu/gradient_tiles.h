// The gradient of one sample, G = sum_t b_t^T a_t, in tiles of 16 x 16 that are used while they are in registers or L1.
#pragma once
#include "cpu/linear_rows.h"
#include "cpu/panels.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// A tile's place in G.
struct Place {
  int64_t row, column;     // of its first element
  int64_t rows, columns;   // that lie within G
  bool is_whole() const { return rows == PANEL && columns == PANEL; }
};

// One thread's memory: all of b packed, and a strip of 16 columns of a, which stays in L1.
template <class T>
class GradientTiles {
 public:
  using F = typename Accumulate<T>::type;

  explicit GradientTiles(const LinearLayer& layer)
      : layer_(layer), lefts_(panels_of(layer.output_grads.width), layer.T * PANEL), right_(1, layer.T * PANEL) {}

  // Calls body(left, right, place) for every tile; for_tile(left, right, T, ...) forms it.
  template <class Body> __attribute__((always_inline)) void for_sample(int64_t sample, Body body) {
    const LinearLayer& layer = layer_;
    const int64_t I = layer.inputs.width, O = layer.output_grads.width;
    for (int64_t p = 0; p < panels_of(O); ++p)
      pack_columns<F>(
          [&](int64_t t) __attribute__((always_inline)) { return layer.output_grads.at<T>(sample, t) + p * PANEL; },
          std::min(PANEL, O - p * PANEL), layer.T, lefts_.row(p));
    for (int64_t q = 0; q < panels_of(I); ++q) {
      const int64_t columns = std::min(PANEL, I - q * PANEL);
      pack_columns<F>([&](int64_t t) __attribute__((always_inline)) { return layer.inputs.at<T>(sample, t) + q * PANEL; },
                      columns, layer.T, right_.row(0));
      for (int64_t p = 0; p < panels_of(O); ++p)
        body(lefts_.row(p), right_.row(0), Place{p * PANEL, q * PANEL, std::min(PANEL, O - p * PANEL), columns});
    }
  }

 private:
  const LinearLayer& layer_;
  Scratch<F> lefts_, right_;
};

// The sum of a tile (16 x 16, contiguous) times the elements of a matrix that are at its place.
template <class F> KDAIF_INLINE F tile_dot(const F* tile, const Place& place, const F* matrix, int64_t stride) {
  const F* from = matrix + place.row * stride + place.column;
  Vec<F> sums[4] = {};
  if (place.is_whole()) {
#pragma GCC unroll 4
    for (int64_t m = 0; m < PANEL; ++m) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < PANEL; v += LANES<F>) sums[m % 4] += load(tile + m * PANEL + v) * load(from + m * stride + v);
    }
  } else {
    for (int64_t m = 0; m < place.rows; ++m)
      for_vectors<F>(place.columns, [&](int64_t v, auto part) __attribute__((always_inline)) {
        sums[m % 4] += load(tile + m * PANEL + v) * part.get(from + m * stride + v, F(0));
      });
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
