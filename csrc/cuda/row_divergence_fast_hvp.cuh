// Curvature products of row_divergence's common case on the GPU. The teacher and the label drop out:
//   weight * (ce (diag(p) - p p^T) + kd / T^2 (diag(q) - q q^T)) u,   p = softmax(s), q = softmax(s / T).
//
// Floor: 2 K + 1 reads or writes of V elements, 2 exponentials an element and row. Here tangents are read twice, for their
// sums and to write, and the student's row once more and twice for every TANGENTS of them; rows of some 100 KiB, these
// tangents included, are found in the caches then.
#pragma once
#include "cuda/row_divergence_fast.cuh"

namespace kdaif {

template <class F>
struct FastProduct {
  F along_1[TANGENTS] = {}, along_T[TANGENTS] = {};  // sums of p u and q u over the row

  // Shares of one class: p and q are its probabilities, u an element of tangent k.
  __device__ __forceinline__ void add(int k, F p, F q, F u) { along_1[k] += p * u, along_T[k] += q * u; }

  template <class Team>
  __device__ __forceinline__ void join(const FastRow<F>& r, int count, const Team& team) {
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= count) break;
      if (r.needs_1()) along_1[k] = team.template reduce<Sum>(along_1[k]);
      if (r.kd != 0) along_T[k] = team.template reduce<Sum>(along_T[k]);
    }
  }
};

// A group of tangents of one row.
template <class T>
struct TangentGroup {
  const T* u;
  T* out;
  int64_t u_stride, out_stride;
  int count;
  __device__ __forceinline__ TangentGroup(const RowDivergence& d, const Tangents& t, int64_t row, int64_t first)
      : u(static_cast<const T*>(t.u) + first * t.tangent_stride + row * t.row_stride),
        out(static_cast<T*>(t.out) + (first * d.N + row) * d.V), u_stride(t.tangent_stride), out_stride(d.N * d.V),
        count(t.K - first < TANGENTS ? static_cast<int>(t.K - first) : TANGENTS) {}
};

// Softmax of one class at T = 1 and at T; 0 where nobody asks.
template <class F>
__device__ __forceinline__ void probabilities(const FastRow<F>& r, F s, F& p, F& q) {
  p = r.needs_1() ? exp_of((s - r.max_s) - r.log_1) : F(0);
  q = r.kd != 0 ? exp_of((s - r.max_s) * r.inverse - r.log_T) : F(0);
}

template <class T, class F, int width, class Team>
__device__ __forceinline__ void sum_tangents(const T* s, int64_t V, const FastRow<F>& r, const TangentGroup<T>& group,
                                             const Team& team, FastProduct<F>& product) {
  for (int64_t v = team.rank() * width; v < V; v += team.size() * width) {
    const Packet<T, width> a = load_packet<T, F, width>(s, v);
    Packet<T, width> u[TANGENTS] = {};
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k)
      if (k < group.count) u[k] = load_packet<T, F, width>(group.u + k * group.u_stride, v);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      F p, q;
      probabilities(r, widen(a.x[i]), p, q);
#pragma unroll
      for (int k = 0; k < TANGENTS; ++k) product.add(k, p, q, widen(u[k].x[i]));
    }
  }
  product.join(r, group.count, team);
}

template <class T, class F, int width, class Team>
__device__ __forceinline__ void write_products(const T* s, int64_t V, const FastRow<F>& r, const TangentGroup<T>& group,
                                               const Team& team, const FastProduct<F>& product) {
  // At T = 1 the one softmax serves both parts.
  const F of_1 = r.weight * r.ce, of_T = r.weight * (r.kd * r.inverse * r.inverse + (r.needs_1() ? F(0) : r.ce));
  for (int64_t v = team.rank() * width; v < V; v += team.size() * width) {
    const Packet<T, width> a = load_packet<T, F, width>(s, v);
    F p[width], q[width];
#pragma unroll
    for (int i = 0; i < width; ++i) probabilities(r, widen(a.x[i]), p[i], q[i]);
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= group.count) break;
      Packet<T, width> u = load_packet<T, F, width>(group.u + k * group.u_stride, v);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const F x = widen(u.x[i]);
        narrow(of_1 * p[i] * (x - product.along_1[k]) + of_T * q[i] * (x - product.along_T[k]), u.x[i]);
      }
      store_packet(u, group.out + k * group.out_stride, v);
    }
  }
}

// Maximum and sums of the student's logits only.
template <class T, class F, int width, class Team>
__device__ __forceinline__ void add_student_row(const T* s, int64_t V, FastRow<F>& r, const Team& team) {
  for (int64_t v = team.rank() * width; v < V; v += team.size() * width) {
    const Packet<T, width> a = load_packet<T, F, width>(s, v);
    F max = lowest<F>();
#pragma unroll
    for (int i = 0; i < width; ++i) max = Max::join(max, widen(a.x[i]));
    r.raise(max, lowest<F>());
#pragma unroll
    for (int i = 0; i < width; ++i) r.add_student(widen(a.x[i]));
  }
}

// Rows and groups of tangents are blocks and blocks_y.
template <class T, class F, int width, class Team>
__device__ __forceinline__ void multiply_row(const RowDivergence& d, bool check, int64_t row, const Tangents& t,
                                             const Team& team) {
  const RowLabel y = row_label(d, row, check);
  const FastPointers<T> at(d, static_cast<T*>(nullptr), row);
  FastRow<F> r(d, row, y);
  if (!y.ignored) {
    add_student_row<T, F, width>(at.s, d.V, r, team);
    r.join_maxima(team);
    r.join_sums(team);
  }
  for (int64_t first = int64_t(blockIdx.y) * TANGENTS; first < t.K; first += int64_t(gridDim.y) * TANGENTS) {
    const TangentGroup<T> group(d, t, row, first);
    if (y.ignored) {
      for (int k = 0; k < group.count; ++k) write_zeros<T, width>(group.out + k * group.out_stride, 0, d.V, team);
      continue;
    }
    FastProduct<F> product;
    sum_tangents<T, F, width>(at.s, d.V, r, group, team, product);
    write_products<T, F, width>(at.s, d.V, r, group, team, product);
  }
}

template <class T, class F, int width>
__global__ void __launch_bounds__(WARPS_IN_BLOCK * WARP, 1)
fast_warp_hvp_kernel(const RowDivergence d, bool check, const Tangents t) {
  const int64_t first = int64_t(blockIdx.x) * WARPS_IN_BLOCK + threadIdx.x / WARP;
  for (int64_t row = first; row < d.N; row += int64_t(gridDim.x) * WARPS_IN_BLOCK)
    multiply_row<T, F, width>(d, check, row, t, WarpTeam<F>());
}

template <class T, class F, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_block_hvp_kernel(const RowDivergence d, bool check, const Tangents t) {
  __shared__ F memory[FAST_THREADS / WARP];
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x)
    multiply_row<T, F, width>(d, check, row, t, BlockTeam<F>{memory});
}

}  // namespace kdaif
