// Transposing planes into vectors: [rows, columns] -> [columns, width], in squares that fit the registers.
#pragma once
#include <algorithm>

#include "cpu/vector.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// Lanes of two vectors after the exchange at distance D: of each 2 D lanes, the lower half stays and the upper half is
// swapped between the two.
template <int D, class V> KDAIF_INLINE void exchange(V& a, V& b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  using I = decltype(a == b);
  constexpr auto lower = [] {
    struct { decltype(I{}[0] + 0) lane[L]; } x{};
    for (int i = 0; i < L; ++i) x.lane[i] = i & D ? L + i - D : i;
    return x;
  }();
  constexpr auto upper = [] {
    struct { decltype(I{}[0] + 0) lane[L]; } x{};
    for (int i = 0; i < L; ++i) x.lane[i] = i & D ? L + i : i + D;
    return x;
  }();
  I first, second;
  std::memcpy(&first, &lower, sizeof first), std::memcpy(&second, &upper, sizeof second);
  const V x = __builtin_shuffle(a, b, first), y = __builtin_shuffle(a, b, second);
  a = x, b = y;
}

template <int D, class V> KDAIF_INLINE void exchange_all(V* rows) {
  constexpr int L = sizeof(V) / sizeof(rows[0][0]);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & D)) exchange<D>(rows[i], rows[i + D]);
}

// A square of as many rows as a vector has lanes.
template <class V> KDAIF_INLINE void transpose_square(V* rows) {
  constexpr int L = sizeof(V) / sizeof(rows[0][0]);
  if constexpr (L >= 16) exchange_all<8>(rows);
  if constexpr (L >= 8) exchange_all<4>(rows);
  if constexpr (L >= 4) exchange_all<2>(rows);
  exchange_all<1>(rows);
}

// Where rows of elements lie, and which element of a row comes at column s.
struct Rows {
  const void* data;
  int64_t stride;       // elements from row to row
  const int64_t* from;  // [columns] offsets within a row, or null: s
};

template <class F, class T>
KDAIF_INLINE void transpose_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, const int64_t* to, F* out,
                                    int64_t width) {
  constexpr int64_t L = LANES<F>;
  Vec<F> square[L];
  const bool whole = columns == L;
#pragma GCC unroll 16
  for (int64_t r = 0; r < L; ++r)
    square[r] = r >= rows ? Vec<F>{} : whole ? load(x + r * stride) : load(x + r * stride, columns, F(0));
  transpose_square(square);
  if (width == L && whole) {
#pragma GCC unroll 16
    for (int64_t s = 0; s < L; ++s)
      if (to[s] >= 0) store(square[s], out + to[s]);
    return;
  }
  for (int64_t s = 0; s < columns; ++s) {
    if (to[s] < 0) continue;
    if (width == L) store(square[s], out + to[s]);
    else store(square[s], out + to[s], width);
  }
}

KDAIF_INLINE bool any_wanted(const int64_t* to, int64_t columns) {
  for (int64_t s = 0; s < columns; ++s)
    if (to[s] >= 0) return true;
  return false;
}

// out[to[s] + r] = x[r, s] for r < rows, and 0 from there to `width`; columns with a negative place are left out.
template <class F, class T>
__attribute__((noinline)) void transpose_rows(const T* x, const Rows& layout, int64_t rows, int64_t columns, const int64_t* to,
                                              F* out, int64_t width) {
  constexpr int64_t L = LANES<F>;
  if (layout.from == nullptr && rows > L / 4) {
    for (int64_t s = 0; s < columns; s += L) {
      const int64_t count = std::min(L, columns - s);
      if (!any_wanted(to + s, count)) continue;
      for (int64_t r = 0; r < width; r += L)
        transpose_columns(x + r * layout.stride + s, layout.stride, rows - r, count, to + s, out + r, std::min(L, width - r));
    }
    return;
  }
  for (int64_t s = 0; s < columns; ++s) {
    if (to[s] < 0) continue;
    const T* column = x + (layout.from ? layout.from[s] : s);
    F* place = out + to[s];
    if (layout.stride == 1) {
      for_vectors<F>(rows, [&](int64_t r, auto part) __attribute__((always_inline)) { part.put(part.get(column + r, F(0)), place + r); });
    } else {
      for (int64_t r = 0; r < rows; ++r) place[r] = F(widen(column[r * layout.stride]));
    }
    for (int64_t r = rows; r < width; ++r) place[r] = 0;
  }
}

// The way back: out[r, s] = x[s, r] for r < rows; x has rows of `width`, a multiple of the lanes.
template <class F, class T>
__attribute__((noinline)) void transpose_back(const F* x, int64_t width, int64_t rows, int64_t columns, T* out) {
  constexpr int64_t L = LANES<F>;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t s = 0; s < columns; s += L) {
      Vec<F> square[L];
      const int64_t count = std::min(L, columns - s), here = std::min(L, rows - r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) square[i] = i < count ? load(x + (s + i) * width + r) : Vec<F>{};
      transpose_square(square);
      if (count == L && here == L) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) store(square[i], out + (r + i) * columns + s);
      } else if (count == L) {
        for (int64_t i = 0; i < here; ++i) store(square[i], out + (r + i) * columns + s);
      } else {
        for (int64_t i = 0; i < here; ++i) store(square[i], out + (r + i) * columns + s, count);
      }
    }
  }
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
