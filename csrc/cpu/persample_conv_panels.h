// What happens to a panel of G while it is in the cache: dots, squared norm, and its way to memory.
#pragma once
#include "cpu/persample_conv_rows.h"
#include "cpu/transpose.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// A few directions share the loads of the panel.
template <int COUNT, class F>
KDAIF_INLINE void panel_dots(const F* panel, const F* directions, int64_t stride, int64_t count, F* dots) {
  Vec<F> sums[COUNT][2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES<F> <= count; i += 2 * LANES<F>)
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        sums[k][half] += load(panel + i + half * LANES<F>) * load(directions + k * stride + i + half * LANES<F>);
  for (; i < count; i += LANES<F>)
    for (int k = 0; k < COUNT; ++k) sums[k][0] += load(panel + i) * load(directions + k * stride + i);
  for (int k = 0; k < COUNT; ++k) dots[k] = sum_of(sums[k][0] + sums[k][1]);
}

template <class F> void reduce_panel(const PersampleConv& conv, const ConvPanel& shape, const F* panel, F* partials) {
  const int64_t K = conv.direction_count, count = conv.row_columns * shape.width, stride = conv.padded_rows * conv.row_columns;
  const F* directions = static_cast<const F*>(conv.directions) + shape.padded_rows_before * conv.row_columns;
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) panel_dots<4>(panel, directions + k * stride, stride, count, partials + k);
  for (; k < K; ++k) panel_dots<1>(panel, directions + k * stride, stride, count, partials + k);
  if (conv.norms) panel_dots<1>(panel, panel, 0, count, partials + K);
}

template <class T, class F>
void finish_panel(const PersampleConv& conv, int64_t sample, int64_t p, const F* panel) {
  const ConvPanel& shape = conv.panels[p];
  reduce_panel(conv, shape, panel, static_cast<F*>(conv.partials) + (sample * conv.panel_count + p) * (conv.direction_count + 1));
  if (conv.grads == nullptr) return;
  T* rows = static_cast<T*>(conv.grads) + sample * conv.grads_stride + shape.first_row * conv.row_columns;
  transpose_back(panel, shape.width, shape.rows, conv.row_columns, rows);
}

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
