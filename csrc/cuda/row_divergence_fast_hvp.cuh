// Curvature products of row_divergence's common case on the GPU. The teacher and the label drop out:
//   weight * (ce (diag(p) - p p^T) + kd / T^2 (diag(q) - q q^T)) u,   p = softmax(s), q = softmax(s / T).
//
// Floor: 2 K + 1 reads or writes of V elements. A first look forms the softmax's sums and the tangents' sums with it, a
// second one writes; up to TANGENTS tangents share both. Short rows are found in the caches the second time, longer ones
// pass through shared memory. An item of work is a row and a group of tangents.
#pragma once
#include "cuda/row_divergence_ring.cuh"

namespace kdaif {

struct ProductSums : RowSums {
  float along_1[TANGENTS] = {}, along_s[TANGENTS] = {};  // of exp2(x_s) u, at T = 1 and at T
};

// A group of tangents of one row.
template <class T>
struct TangentGroup {
  const T *s, *u;
  T* out;
  int64_t row, u_stride, out_stride;
  int count;
  __device__ __forceinline__ TangentGroup(const RowDivergence& d, const Tangents& t, int64_t item) {
    const int64_t groups = (t.K + TANGENTS - 1) / TANGENTS, first = item % groups * TANGENTS;
    row = item / groups;
    s = row_at(static_cast<const T*>(d.student), row, d.student_stride);
    u = static_cast<const T*>(t.u) + first * t.tangent_stride + row * t.row_stride, u_stride = t.tangent_stride;
    out = static_cast<T*>(t.out) + (first * d.N + row) * d.V, out_stride = d.N * d.V;
    count = t.K - first < TANGENTS ? static_cast<int>(t.K - first) : TANGENTS;
  }
};

template <int parts>
struct ProductRow {
  using Row = FastRow<parts>;
  Row r;
  ProductSums sums;
  int count;

  __device__ __forceinline__ ProductRow(const RowDivergence& d, float temperature, int count)
      : r(d, temperature), count(count) {}

  __device__ __forceinline__ void scale(Factors f) {
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      sums.along_s[k] *= f.of_s;
      if (Row::has_1) sums.along_1[k] *= f.of_1;
    }
  }

  template <class T, int width, class Load>
  __device__ __forceinline__ void add(const Packet<T, width>& s, Load load) {
    float max = s[0], e_s[width], e_1[width];
#pragma unroll
    for (int i = 1; i < width; ++i) max = fmaxf(max, s[i]);
    if (max > r.limit_s) scale(r.move_student(max));
    exponentials(s, e_s, e_1);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      r.sums.sum_s += e_s[i];
      if (Row::has_1) r.sums.sum_1 += e_1[i];
    }
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= count) break;
      const Packet<T, width> u = load(k);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sums.along_s[k] += e_s[i] * u[i];
        if (Row::has_1) sums.along_1[k] += e_1[i] * u[i];
      }
    }
  }

  template <class T, int width>
  __device__ __forceinline__ void exponentials(const Packet<T, width>& s, float (&e_s)[width], float (&e_1)[width]) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      e_s[i] = exp2_of(r.exponent_s(s[i]));
      if (Row::has_1) e_1[i] = exp2_of(r.exponent_1(s[i]));
    }
  }

  __device__ __forceinline__ void take(const ProductSums& others) {
    sums = others;
    r.take(others);
  }
  __device__ __forceinline__ void join_warp() {
    scale(r.join_student());
#pragma unroll
    for (int k = 0; k < TANGENTS; ++k) {
      if (k >= count) break;
      sums.along_s[k] = warp_reduce<Sum>(sums.along_s[k]);
      if (Row::has_1) sums.along_1[k] = warp_reduce<Sum>(sums.along_1[k]);
    }
    static_cast<RowSums&>(sums) = r.sums;
  }
};

// The packet of tangent k's product.
template <int parts, class T, int width>
__device__ __forceinline__ Packet<T, width> product_packet(const ProductRow<parts>& p, const float (&a_s)[width],
                                                           const float (&a_1)[width], float mean_s, float mean_1,
                                                           const Packet<T, width>& u) {
  float g[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float x = u[i];
    g[i] = a_s[i] * (x - mean_s);
    if (ProductRow<parts>::Row::has_1) g[i] += a_1[i] * (x - mean_1);
  }
  return Packet<T, width>::of(g);
}

// Writes the products at element v.
template <int parts, class T, int width, class Load>
__device__ __forceinline__ void write_products(ProductRow<parts>& p, const TangentGroup<T>& group, float of_s,
                                               float of_1, const float (&mean_s)[TANGENTS],
                                               const float (&mean_1)[TANGENTS], const Packet<T, width>& s, int64_t v,
                                               Load load) {
  float a_s[width], a_1[width];
  p.exponentials(s, a_s, a_1);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    a_s[i] *= of_s;
    if (ProductRow<parts>::Row::has_1) a_1[i] *= of_1;
  }
#pragma unroll
  for (int k = 0; k < TANGENTS; ++k) {
    if (k >= group.count) break;
    store_packet(product_packet(p, a_s, a_1, mean_s[k], mean_1[k], load(k)), group.out + k * group.out_stride + v);
  }
}

// first(body) and second(body) look at the row: body(v, student's packet, k -> tangent k's packet).
template <int parts, class T, int width, class Team, class First, class Second>
__device__ __forceinline__ void multiply_row(const RowDivergence& d, const TangentGroup<T>& group, float weight,
                                             Team& team, First first, Second second) {
  const float kd = d.teacher == nullptr ? 0 : float(d.kd), T_ = kd == 0 ? 1.0f : float(d.temperature);
  ProductRow<parts> p(d, T_, group.count);
  first([&](int64_t, const Packet<T, width>& s, auto load) { p.add(s, load); });
  team.join(p);
  const float inverse_s = reciprocal(p.sums.sum_s), inverse_1 = parts == TWO_SOFTMAXES ? reciprocal(p.sums.sum_1) : 0;
  // Where there is one softmax, it serves both parts.
  const float of_s = weight * (kd / (T_ * T_) + (parts == ONE_SOFTMAX ? float(d.ce) : 0)) * inverse_s;
  const float of_1 = weight * float(d.ce) * inverse_1;
  float mean_s[TANGENTS], mean_1[TANGENTS];
#pragma unroll
  for (int k = 0; k < TANGENTS; ++k)
    mean_s[k] = p.sums.along_s[k] * inverse_s, mean_1[k] = p.sums.along_1[k] * inverse_1;
  second([&](int64_t v, const Packet<T, width>& s, auto load) {
    write_products(p, group, of_s, of_1, mean_s, mean_1, s, v, load);
  });
}

template <class T, int width, class Team>
__device__ __forceinline__ void write_zero_products(const TangentGroup<T>& group, int64_t V, const Team& team) {
  for (int k = 0; k < group.count; ++k) write_zeros<T, width>(group.out + k * group.out_stride, 0, V, team);
}

// Both looks read memory.
template <int parts, class T, int width, class Team>
__device__ __forceinline__ void multiply_from_memory(const RowDivergence& d, bool check, int64_t item,
                                                     const Tangents& t, Team& team) {
  const TangentGroup<T> group(d, t, item);
  const RowLabel y = row_label(d, group.row, check);
  if (y.ignored) return write_zero_products<T, width>(group, d.V, team);
  auto look = [&](auto body) {
    for (int64_t v = team.rank() * width; v < d.V; v += team.size() * width)
      body(v, load_packet<T, width>(group.s + v),
           [&](int k) { return load_packet<T, width>(group.u + k * group.u_stride + v); });
  };
  multiply_row<parts, T, width>(d, group, weight_of(d, group.row, y), team, look, look);
}

template <int parts, class T, int width>
__global__ void __launch_bounds__(WARPS_IN_BLOCK * WARP, 6)
fast_warp_hvp_kernel(const RowDivergence d, bool check, int64_t items, const Tangents t) {
  const int64_t first = int64_t(blockIdx.x) * WARPS_IN_BLOCK + threadIdx.x / WARP;
  WarpTeam team;
  for (int64_t item = first; item < items; item += int64_t(gridDim.x) * WARPS_IN_BLOCK)
    multiply_from_memory<parts, T, width>(d, check, item, t, team);
}

template <int parts, class T, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_block_hvp_kernel(const RowDivergence d, bool check, int64_t items, const Tangents t) {
  __shared__ BlockMemory<ProductSums> memory;
  BlockTeam<ProductSums> team(memory);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x)
    multiply_from_memory<parts, T, width>(d, check, item, t, team);
}

// The student's row and the tangents.
template <class T>
struct ProductSource {
  const RowDivergence& d;
  const Tangents& t;
  const T *s = nullptr, *u = nullptr;
  int64_t u_stride = 0;
  int count = 0;
  __device__ __forceinline__ bool open(int64_t item) {
    const TangentGroup<T> group(d, t, item);
    s = group.s, u = group.u, u_stride = group.u_stride, count = group.count;
    return d.labels == nullptr || d.labels[group.row] != d.ignore_index;
  }
  __device__ __forceinline__ int streams() const { return 1 + count; }
  __device__ __forceinline__ const T* stream(int k) const { return k == 0 ? s : u + (k - 1) * u_stride; }
};

template <int parts, class T, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_ring_hvp_kernel(const RowDivergence d, const RingShape shape, bool check, int64_t items, const Tangents t) {
  __shared__ BlockMemory<ProductSums> memory;
  static_assert(sizeof memory <= STATIC_SHARED);
  BlockTeam<ProductSums> team(memory);
  Ring<T, width, 1, IN_FLIGHT_HVP, ProductSource<T>> ring(shape, d.V, items, ProductSource<T>{d, t});
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const TangentGroup<T> group(d, t, item);
    const RowLabel y = row_label(d, group.row, check);
    if (y.ignored) {
      write_zero_products<T, width>(group, d.V, team);
      continue;
    }
    auto with_packets = [&](auto body) {
      return [&ring, body](int v, int slot, int) {
        body(v, ring.packet(slot, 0, 0), [&](int k) { return ring.packet(slot, 1 + k, 0); });
      };
    };
    multiply_row<parts, T, width>(
        d, group, weight_of(d, group.row, y), team, [&](auto body) { ring.first_look(with_packets(body)); },
        [&](auto body) { ring.second_look(with_packets(body)); });
  }
}

}  // namespace kdaif
