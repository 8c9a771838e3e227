// From a call of row_divergence's common case to its kernels; launch as in row_divergence_general_launch.cuh.
#pragma once
#include "cuda/row_divergence_fast_hvp.cuh"

namespace kdaif {

template <class T, int width, class Launcher>
void launch_split(const FastPlan& p, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                  Launcher launch) {
  float* values = loss == nullptr ? nullptr : workspace + d.N * p.chunks * PARTIALS;
  launch(fast_split_sums_kernel<T, float, width>, p.launch, d, check, p.chunk, workspace);
  launch(fast_split_terms_kernel<T, float, width>, p.launch, d, p.chunk, workspace, values, grad);
  if (loss == nullptr) return;
  launch(fast_split_loss_kernel<float>, Launch{p.launch.blocks_y, 1, WARP}, static_cast<int>(p.chunks), values, loss);
}

template <class T, int width, class Launcher>
void launch_fast_width(const FastPlan& p, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                       Launcher launch) {
  constexpr int few = width == 1 ? 8 : 1, some = width == 1 ? 8 : 4;
  switch (p.path) {
    case FastPath::warp:
      if (p.packets == few) return launch(fast_warp_kernel<T, float, width, few>, p.launch, d, check, loss, grad);
      return launch(fast_warp_kernel<T, float, width, some>, p.launch, d, check, loss, grad);
    case FastPath::block:
      if (p.packets == some) return launch(fast_block_kernel<T, float, width, some>, p.launch, d, check, loss, grad);
      return launch(fast_block_kernel<T, float, width, 8>, p.launch, d, check, loss, grad);
    case FastPath::wide: return launch(fast_wide_kernel<T, float, width>, p.launch, d, check, loss, grad);
    case FastPath::split: return launch_split<T, width>(p, d, check, loss, grad, workspace, launch);
  }
}

// For is_common() arguments; `workspace` holds p.workspace floats.
template <class T, class Launcher>
void launch_fast(const FastPlan& p, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                 Launcher launch) {
  if (p.width == 1) launch_fast_width<T, 1>(p, d, check, loss, grad, workspace, launch);
  else launch_fast_width<T, 16 / sizeof(T)>(p, d, check, loss, grad, workspace, launch);
}

template <class T, int width, class Launcher>
void launch_fast_hvp_width(const FastHvpPlan& p, const RowDivergence& d, bool check, const Tangents& t,
                           Launcher launch) {
  if (p.warps) launch(fast_warp_hvp_kernel<T, float, width>, p.launch, d, check, t);
  else launch(fast_block_hvp_kernel<T, float, width>, p.launch, d, check, t);
}

template <class T, class Launcher>
void launch_fast_hvp(const FastHvpPlan& p, const RowDivergence& d, bool check, const Tangents& t, Launcher launch) {
  if (p.width == 1) launch_fast_hvp_width<T, 1>(p, d, check, t, launch);
  else launch_fast_hvp_width<T, 16 / sizeof(T)>(p, d, check, t, launch);
}

}  // namespace kdaif
