// Matrix products whose result is used while it is in registers. Both factors are packed into panels: 16 columns of a
// matrix side by side, [depth, 16], zeros where it has fewer, so that a product of two panels is a tile [16, 16] and no
// loop has an edge. What a vendor's product would write to memory and read again, a caller takes row by row here.
//
// Floor: one multiply-add a lane and cycle (Zen 4; two on Intel's servers). A tile of 16 rows loads 17 values per 16
// multiply-adds, which two loads a cycle deliver; its factors come from L1 (one panel of 256 x 16 is 16 KiB) and L2.
//
// Measured, as all figures of this family: torch 2.13 with MKL, AVX-512 (Zen 4), one thread, medians of thread time, calls
// interleaved with the vendor's product in one process. float32: 91 to 101 GFLOP/s, MKL's sgemm on the same shapes 82 to 95.
#pragma once
#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

constexpr int64_t PANEL = 16;
template <class F> constexpr int64_t VECTORS = PANEL / LANES<F>;  // in a row of a tile
// Rows formed at once: accumulators of 16 registers of 32 (AVX-512), or 8 of 16, so that none is spilled.
template <class F> constexpr int64_t PASS = (KDAIF_VECTOR_BYTES == 64 ? 16 : 8) / VECTORS<F>;

KDAIF_INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// Calls use(m, v, sums) for every vector of the tile left^T right: row m, columns from v * LANES.
template <class F, class Use> KDAIF_INLINE void for_tile(const F* left, const F* right, int64_t depth, Use use) {
  for (int64_t first = 0; first < PANEL; first += PASS<F>) {
    Vec<F> sums[PASS<F>][VECTORS<F>] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const F *row = right + k * PANEL, *column = left + k * PANEL + first;
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS<F>; ++v) {
        const Vec<F> x = copy_in<Vec<F>>(row + v * LANES<F>);
#pragma GCC unroll 16
        for (int64_t m = 0; m < PASS<F>; ++m) sums[m][v] += x * column[m];
      }
    }
#pragma GCC unroll 16
    for (int64_t m = 0; m < PASS<F>; ++m) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS<F>; ++v) use(first + m, v, sums[m][v]);
    }
  }
}

// The columns [0, count <= 16) of a matrix of `depth` rows, row k at row(k), times scale(k).
template <class F, class Row, class Scale>
KDAIF_INLINE void pack_columns(Row row, Scale scale, int64_t count, int64_t depth, F* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    const auto* x = row(k);
    const F factor = scale(k);
    F* to = panel + k * PANEL;
    if (count == PANEL) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < PANEL; v += LANES<F>) store(load(x + v) * factor, to + v);
      continue;
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < PANEL; v += LANES<F>)
      store(v < count ? (count - v < LANES<F> ? load(x + v, count - v, F(0)) : load(x + v)) * factor : Vec<F>{}, to + v);
  }
}
template <class F, class Row> KDAIF_INLINE void pack_columns(Row row, int64_t count, int64_t depth, F* panel) {
  pack_columns<F>(row, [](int64_t) __attribute__((always_inline)) { return F(1); }, count, depth, panel);
}

// Rows become columns: log2(LANES) perfect shuffles of a square of vectors transpose it.
template <class F> KDAIF_INLINE void transpose(Vec<F> (&x)[LANES<F>]) {
  using Index = decltype(x[0] == x[0]);
  constexpr int64_t L = LANES<F>;
  Index low{}, high{};
#pragma GCC unroll 16
  for (int64_t i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = L / 2 + i / 2 + i % 2 * L;
  }
#pragma GCC unroll 4
  for (int64_t stage = 1; stage < L; stage *= 2) {
    Vec<F> y[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + L / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) x[i] = y[i];
  }
}

// Columns [first, first + depth) of `count <= 16` rows, row m at row(m), which become the panel's columns.
template <class F, class Row>
KDAIF_INLINE void pack_rows(Row row, int64_t count, int64_t first, int64_t depth, F* panel) {
  constexpr int64_t L = LANES<F>;
  for (int64_t group = 0; group < PANEL; group += L) {
    const int64_t rows = std::min(L, count - group);
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t columns = std::min(L, depth - k);
      Vec<F> square[L] = {};
      if (rows == L && columns == L) {
#pragma GCC unroll 16
        for (int64_t m = 0; m < L; ++m) square[m] = load(row(group + m) + first + k);
      } else {
        for (int64_t m = 0; m < rows; ++m)
          square[m] = columns == L ? load(row(group + m) + first + k) : load(row(group + m) + first + k, columns, F(0));
      }
      transpose<F>(square);
      if (columns == L) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) store(square[i], panel + (k + i) * PANEL + group);
      } else {
        for (int64_t i = 0; i < columns; ++i) store(square[i], panel + (k + i) * PANEL + group);
      }
    }
  }
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
