// row_divergence's common case where rows are few and wide: several blocks a row, in three launches; block (c, row) has
// chunk c. Chunks are joined in a fixed order: each block of the second launch does that anew rather than wait for
// another.
#pragma once
#include "cuda/row_divergence_fast.cuh"

namespace kdaif {

template <int parts, class T, int width>
__global__ void __launch_bounds__(FAST_THREADS, 2)
fast_split_sums_kernel(const RowDivergence d, bool check, int64_t chunk, RowSums* __restrict__ partials) {
  __shared__ BlockMemory<RowSums> memory;
  BlockTeam<RowSums> team(memory);
  const int64_t row = blockIdx.y, begin = blockIdx.x * chunk, end = begin + chunk < d.V ? begin + chunk : d.V;
  if (row_label(d, row, check).ignored) return;
  FastRow<parts> r = fast_row<parts>(d);
  add_range<parts, T, width>(FastPointers<T>(d, static_cast<T*>(nullptr), row), begin, end, r, team);
  team.join(r);
  if (team.rank() == 0) partials[row * gridDim.x + blockIdx.x] = r.sums;
}

template <int parts, class T, int width>
__global__ void __launch_bounds__(FAST_THREADS, 2)
fast_split_terms_kernel(const RowDivergence d, int64_t chunk, const RowSums* __restrict__ partials,
                        float* __restrict__ values, T* __restrict__ grads) {
  __shared__ BlockMemory<RowSums> memory;
  BlockTeam<RowSums> team(memory);
  const int64_t row = blockIdx.y, begin = blockIdx.x * chunk, end = begin + chunk < d.V ? begin + chunk : d.V;
  const RowLabel y = row_label(d, row, false);
  const FastPointers<T> at(d, grads, row);
  float value = 0;
  if (y.ignored) {
    write_zeros<T, width>(at.grad, begin, end, team);
  } else {
    const AtLabel<T> l = AtLabel<T>::template of<parts>(at, y);
    const float weight = weight_of(d, row, y);
    FastRow<parts> r = fast_row<parts>(d);
    if (team.rank() < static_cast<int>(gridDim.x)) r.take(partials[row * gridDim.x + team.rank()]);
    team.join(r);
    write_range<parts, T, width>(at, begin, end, y, l, r, weight, d, team);
    float divergence = 0;
    if constexpr (parts != LABELS) {
      if (values != nullptr && needs_terms(r))
        divergence = team.sum(divergence_of_terms<parts, T, width>(at.s, at.t, begin, end, r, team));
      else if (blockIdx.x == 0) divergence = divergence_of_sums(r);
    }
    value = weight * (blockIdx.x == 0 ? row_loss(d, r, y, widen(l.s), divergence) : float(d.kd) * divergence);
  }
  if (values != nullptr && team.rank() == 0) values[row * gridDim.x + blockIdx.x] = value;
}

inline __global__ void __launch_bounds__(WARP)
fast_split_loss_kernel(int chunks, const float* __restrict__ values, float* __restrict__ loss) {
  float value = 0;
  for (int c = threadIdx.x; c < chunks; c += WARP) value += values[int64_t(blockIdx.x) * chunks + c];
  value = warp_reduce<Sum>(value);
  if (threadIdx.x == 0) loss[blockIdx.x] = value;
}

}  // namespace kdaif
