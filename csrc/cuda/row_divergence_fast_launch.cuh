// From a call of row_divergence's common case to its kernels; launch as in row_divergence_general_launch.cuh.
#pragma once
#include "cuda/row_divergence_fast_hvp.cuh"
#include "cuda/row_divergence_ring.cuh"
#include "cuda/row_divergence_split.cuh"

namespace kdaif {

// Calls body with what the row's loss consists of, as a constant.
template <class Body>
void for_parts(const RowDivergence& d, Body body) {
  if (d.teacher == nullptr || d.kd == 0) return body(std::integral_constant<int, LABELS>());
  if (d.ce == 0) return body(std::integral_constant<int, TEACHER>());
  if (d.temperature == 1) return body(std::integral_constant<int, BOTH_AT_1>());
  if (d.temperature == 2) return body(std::integral_constant<int, BOTH_AT_2>());
  body(std::integral_constant<int, BOTH>());
}

template <int parts, class T, int width, class Launcher>
void launch_split(const FastPlan& p, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                  Launcher launch) {
  RowSums* sums = reinterpret_cast<RowSums*>(workspace);
  float* values = loss == nullptr ? nullptr : workspace + d.N * p.chunks * ROW_SUMS;
  launch(fast_split_sums_kernel<parts, T, width>, p.launch, d, check, p.chunk, sums);
  launch(fast_split_terms_kernel<parts, T, width>, p.launch, d, p.chunk, sums, values, grad);
  if (loss == nullptr) return;
  launch(fast_split_loss_kernel, Launch{p.launch.blocks_y, 1, WARP}, static_cast<int>(p.chunks), values, loss);
}

template <int parts, class T, int width, class Launcher>
void launch_fast_width(const FastPlan& p, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                       Launcher launch) {
  constexpr int few = width == 1 ? 8 : 1, some = width == 1 ? 8 : KEPT_PACKETS;
  switch (p.path) {
    case FastPath::warp:
      if (p.packets == few) return launch(fast_warp_kernel<parts, T, width, few>, p.launch, d, check, loss, grad);
      return launch(fast_warp_kernel<parts, T, width, some>, p.launch, d, check, loss, grad);
    case FastPath::split: return launch_split<parts, T, width>(p, d, check, loss, grad, workspace, launch);
    case FastPath::wide: return launch(fast_wide_kernel<parts, T, width>, p.launch, d, check, loss, grad);
    default: break;
  }
  if constexpr (width > 1) {
    if (p.path == FastPath::ring)
      return launch(fast_ring_kernel<parts, T, width>, p.launch, d, p.ring, check, loss, grad);
    launch(fast_block_kernel<parts, T, width, some>, p.launch, d, check, loss, grad);
  }
}

// For is_common() arguments; `workspace` holds p.workspace floats.
template <class T, class Launcher>
void launch_fast(const FastPlan& p, const RowDivergence& d, bool check, float* loss, T* grad, float* workspace,
                 Launcher launch) {
  for_parts(d, [&](auto parts) {
    if (p.width == 1) launch_fast_width<parts(), T, 1>(p, d, check, loss, grad, workspace, launch);
    else launch_fast_width<parts(), T, 16 / sizeof(T)>(p, d, check, loss, grad, workspace, launch);
  });
}

template <int parts, class T, int width, class Launcher>
void launch_fast_hvp_width(const FastHvpPlan& p, const RowDivergence& d, bool check, const Tangents& t,
                           Launcher launch) {
  if (p.path == FastPath::warp)
    return launch(fast_warp_hvp_kernel<parts, T, width>, p.launch, d, check, p.items, t);
  if constexpr (width > 1)
    if (p.path == FastPath::ring)
      return launch(fast_ring_hvp_kernel<parts, T, width>, p.launch, d, p.ring, check, p.items, t);
  launch(fast_block_hvp_kernel<parts, T, width>, p.launch, d, check, p.items, t);
}

template <class T, class Launcher>
void launch_fast_hvp(const FastHvpPlan& p, const RowDivergence& d, bool check, const Tangents& t, Launcher launch) {
  auto with_parts = [&](auto parts) {
    if (p.width == 1) launch_fast_hvp_width<parts(), T, 1>(p, d, check, t, launch);
    else launch_fast_hvp_width<parts(), T, 16 / sizeof(T)>(p, d, check, t, launch);
  };
  if (d.teacher != nullptr && d.kd != 0 && d.ce != 0 && d.temperature != 1)
    with_parts(std::integral_constant<int, TWO_SOFTMAXES>());
  else with_parts(std::integral_constant<int, ONE_SOFTMAX>());
}

}  // namespace kdaif
