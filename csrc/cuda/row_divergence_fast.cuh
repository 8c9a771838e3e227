// row_divergence's common case on the GPU: cross-entropy with labels, and forward KL or cross-entropy with a teacher's
// logits, no options. float32, bfloat16 and float16; everything else is the business of row_divergence.cuh.
//
// Floor: 2 reads and 1 write of V elements. Short rows are kept in the registers of a warp or a block, which leaves room
// for several rows on a multiprocessor; longer ones pass through shared memory (row_divergence_ring.cuh). What cannot be
// loaded 16 bytes at a time is read twice; few and very wide rows are read twice by several blocks each.
#pragma once
#include "cuda/row_divergence_fast_row.cuh"

namespace kdaif {

// The threads that share a row. join() gives all of them the sums of all.
struct WarpTeam {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) % WARP; }
  __device__ __forceinline__ int size() const { return WARP; }
  __device__ __forceinline__ float sum(float x) const { return warp_reduce<Sum>(x); }
  template <class Row> __device__ __forceinline__ void join(Row& r) { r.join_warp(); }
};

// `turn` tells which half of the memory is written: whoever still reads the other is not disturbed, so that one barrier
// a row is enough.
template <class Sums>
struct BlockMemory {
  Sums sums[2][FAST_THREADS / WARP];
  float values[FAST_THREADS / WARP];
};
template <class Sums>
struct BlockTeam {
  BlockMemory<Sums>& memory;
  int turn = 0;
  __device__ __forceinline__ explicit BlockTeam(BlockMemory<Sums>& memory) : memory(memory) {}
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ float sum(float x) const { return block_reduce<Sum>(x, memory.values); }
  template <class Row>
  __device__ __forceinline__ void join(Row& r) {
    const int lane = rank() % WARP, warps = size() / WARP;
    r.join_warp();
    if (lane == 0) memory.sums[turn][rank() / WARP] = r.sums;
    __syncthreads();
    r.take(lane < warps ? memory.sums[turn][lane] : Sums{});
    r.join_warp();
    turn = 1 - turn;
  }
};

// Where the pieces of a row lie.
template <class T>
struct FastPointers {
  const T *s, *t;
  T* grad;
  __device__ __forceinline__ FastPointers(const RowDivergence& d, T* grads, int64_t row)
      : s(row_at(static_cast<const T*>(d.student), row, d.student_stride)),
        t(d.teacher == nullptr ? nullptr : row_at(static_cast<const T*>(d.teacher), row, d.teacher_stride)),
        grad(grads == nullptr ? nullptr : row_at(grads, row, d.V)) {}
};

template <int parts>
__device__ __forceinline__ FastRow<parts> fast_row(const RowDivergence& d) {
  return FastRow<parts>(d, parts == LABELS || parts == BOTH_AT_1 ? 1.0f : float(d.temperature));
}

template <class T, int width, class Team>
__device__ __forceinline__ void write_zeros(T* grad, int64_t begin, int64_t end, const Team& team) {
  if (grad == nullptr) return;
  for (int64_t v = begin + team.rank() * width; v < end; v += team.size() * width)
    store_packet(Packet<T, width>{}, grad + v);
}

// Log of one exponential sum over another, or of one; in nats.
__device__ __forceinline__ float log_ratio(float a, float b) { return LN_2 * (std::log2(a) - std::log2(b)); }

// The divergence from the teacher as the sums have it.
template <int parts>
__device__ __forceinline__ float divergence_of_sums(const FastRow<parts>& r) {
  const float gap = LN_2 * r.sums.gaps / r.sums.sum_t;
  return r.kl != 0 ? gap - log_ratio(r.sums.sum_t, r.sums.sum_s) : gap + log_ratio(r.sums.sum_s, 1);
}

// Whether that is good enough; NaN and infinity, which excluded classes make of it, are not. The same in all threads.
template <int parts>
__device__ __forceinline__ bool needs_terms(const FastRow<parts>& r) {
  const float value = divergence_of_sums(r);
  return !((r.kl == 0 || value >= SMALL) && value < INFINITY);
}

// This thread's share of the divergence, term by term.
template <int parts, class T, int width, class Team>
__device__ __forceinline__ float divergence_of_terms(const T* s, const T* t, int64_t begin, int64_t end,
                                                  const FastRow<parts>& r, const Team& team) {
  const float log_s = log_ratio(r.sums.sum_s, 1), log_t = log_ratio(r.sums.sum_t, 1);
  const float scale_s = 1 / r.sums.sum_s, scale_t = 1 / r.sums.sum_t;
  const TermSettings<float> w{1, 0, 0, 1, true};
  float value = 0;
  for (int64_t v = begin + team.rank() * width; v < end; v += team.size() * width) {
    const Packet<T, width> a = load_packet<T, width>(s + v), b = load_packet<T, width>(t + v);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float x_s = r.exponent_s(a[i]), x_t = r.exponent_t(b[i]);
      const float q = exp2_of(x_s) * scale_s, p = exp2_of(x_t) * scale_t;
      if (r.kl != 0) value += row_term<KL, float, float>(q, 0, p, LN_2 * (x_t - x_s) - (log_t - log_s), w).value;
      else value += row_term<CROSS_ENTROPY, float, float>(q, LN_2 * x_s - log_s, p, LN_2 * x_t - log_t, w).value;
    }
  }
  return value;
}

// The row's logits at its label; asked for early, since they come from afar.
template <class T>
struct AtLabel {
  T s{}, t{};
  bool here;

  template <int parts>
  static __device__ __forceinline__ AtLabel of(const FastPointers<T>& at, const RowLabel& y) {
    AtLabel l;
    l.here = parts != TEACHER && y.legal && y.label >= 0;
    if (!l.here) return l;
    l.s = at.s[y.label];
    if (FastRow<parts>::has_teacher) l.t = at.t[y.label];
    return l;
  }
};

// The gradient at the label once more, with the label's own part: by the thread that has written it without, so after
// that. The range is the team's, `size` a power of 2.
template <int parts, int width, class T, class Team>
__device__ __forceinline__ void write_label(const FastPointers<T>& at, const RowLabel& y, const AtLabel<T>& l,
                                            int64_t begin, int64_t end, const FastRow<parts>& r,
                                            const GradientFactors<parts>& f, const Team& team) {
  if (!l.here || y.label < begin || y.label >= end) return;
  if (static_cast<int>((y.label - begin) / width & (team.size() - 1)) != team.rank()) return;
  float g[1];
  gradients<parts, float, 1>(r, f, Packet<float, 1>::of({widen(l.s)}), Packet<float, 1>::of({widen(l.t)}), g);
  narrow(g[0] - f.of_label, at.grad[y.label]);
}

// The loss of a row, without its weight.
template <int parts>
__device__ __forceinline__ float row_loss(const RowDivergence& d, const FastRow<parts>& r, const RowLabel& y,
                                          float at_label, float divergence) {
  float value = 0;
  if (parts != LABELS) value += float(d.kd) * divergence;
  if (parts == TEACHER || y.label < 0) return value;
  const float x = r.has_1 ? r.exponent_1(at_label) : r.exponent_s(at_label);
  return value + float(d.ce) * (log_ratio(r.has_1 ? r.sums.sum_1 : r.sums.sum_s, 1) - LN_2 * x);
}

// Once the sums are joined. All threads of the team come here.
template <int parts, class T, int width, class Team>
__device__ __forceinline__ void write_loss(const RowDivergence& d, const FastPointers<T>& at, const FastRow<parts>& r,
                                           const RowLabel& y, float weight, const AtLabel<T>& l, const Team& team,
                                           float* loss) {
  if (loss == nullptr) return;
  float divergence = 0;
  if constexpr (parts != LABELS) {
    divergence = divergence_of_sums(r);
    if (needs_terms(r)) divergence = team.sum(divergence_of_terms<parts, T, width>(at.s, at.t, 0, d.V, r, team));
  }
  if (team.rank() == 0) *loss = weight * row_loss(d, r, y, widen(l.s), divergence);
}

__device__ __forceinline__ float weight_of(const RowDivergence& d, int64_t row, const RowLabel& y) {
  return y.legal ? row_weight<float>(d, row) : NAN;
}

// A row kept in registers: packet i of a thread begins at element (i * team + rank) * width. It is loaded before its
// label says whether it counts.
template <int parts, class T, int width, int packets, class Team>
__device__ __forceinline__ void whole_row(const RowDivergence& d, bool check, int64_t row, float* loss, T* grads,
                                          Team& team) {
  const FastPointers<T> at(d, grads, row);
  const int V = static_cast<int>(d.V), step = team.size() * width, first = team.rank() * width;
  Packet<T, width> s[packets], t[packets] = {};
#pragma unroll
  for (int i = 0; i < packets; ++i) {
    if (first + i * step >= V) continue;
    s[i] = load_packet<T, width>(at.s + first + i * step);
    if constexpr (parts != LABELS) t[i] = load_packet<T, width>(at.t + first + i * step);
  }
  const RowLabel y = row_label(d, row, check);
  if (y.ignored) {
    if (loss != nullptr && team.rank() == 0) loss[row] = 0;
    return write_zeros<T, width>(at.grad, 0, V, team);
  }
  const AtLabel<T> l = AtLabel<T>::template of<parts>(at, y);
  const float weight = weight_of(d, row, y);
  FastRow<parts> r = fast_row<parts>(d);
#pragma unroll
  for (int i = 0; i < packets; ++i) {
    if (first + i * step >= V) continue;
    forget_widened(s[i]);
    forget_widened(t[i]);
    r.add(s[i], t[i]);
  }
  team.join(r);
  if (at.grad != nullptr) {
    const GradientFactors<parts> f(d, r, weight);
#pragma unroll
    for (int i = 0; i < packets; ++i) {
      const int v = first + i * step;
      if (v >= V) continue;
      forget_widened(s[i]);
      forget_widened(t[i]);
      store_packet(gradient_packet(r, f, s[i], t[i]), at.grad + v);
    }
    write_label<parts, width>(at, y, l, 0, V, r, f, team);
  }
  write_loss<parts, T, width>(d, at, r, y, weight, l, team, loss == nullptr ? nullptr : loss + row);
}

// 28 warps a multiprocessor; at the 64 registers that 32 would leave, sm_80 spills.
template <int parts, class T, int width, int packets>
__global__ void __launch_bounds__(WARPS_IN_BLOCK * WARP, 7)
fast_warp_kernel(const RowDivergence d, bool check, float* __restrict__ loss, T* __restrict__ grads) {
  const int64_t first = int64_t(blockIdx.x) * WARPS_IN_BLOCK + threadIdx.x / WARP;
  WarpTeam team;
  for (int64_t row = first; row < d.N; row += int64_t(gridDim.x) * WARPS_IN_BLOCK)
    whole_row<parts, T, width, packets>(d, check, row, loss, grads, team);
}

// At least two rows a multiprocessor: while one is loaded, another is worked on.
template <int parts, class T, int width, int packets>
__global__ void __launch_bounds__(FAST_THREADS, 2)
fast_block_kernel(const RowDivergence d, bool check, float* __restrict__ loss, T* __restrict__ grads) {
  __shared__ BlockMemory<RowSums> memory;
  BlockTeam<RowSums> team(memory);
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x)
    whole_row<parts, T, width, packets>(d, check, row, loss, grads, team);
}

// Sums of a part of a row that is not kept.
template <int parts, class T, int width, class Team>
__device__ __forceinline__ void add_range(const FastPointers<T>& at, int64_t begin, int64_t end, FastRow<parts>& r,
                                          const Team& team) {
  for (int64_t v = begin + team.rank() * width; v < end; v += team.size() * width) {
    Packet<T, width> t = {};
    if constexpr (parts != LABELS) t = load_packet<T, width>(at.t + v);
    r.add(load_packet<T, width>(at.s + v), t);
  }
}

// Its gradient; the other way round, since its end is what the caches still have.
template <int parts, class T, int width, class Team>
__device__ __forceinline__ void write_range(const FastPointers<T>& at, int64_t begin, int64_t end,
                                            const RowLabel& y, const AtLabel<T>& l, const FastRow<parts>& r,
                                            float weight, const RowDivergence& d, const Team& team) {

  if (at.grad == nullptr) return;
  const GradientFactors<parts> f(d, r, weight);
  const int64_t step = team.size() * width, first = begin + team.rank() * width;
  for (int64_t v = first + (end - begin - 1) / step * step; v >= first; v -= step) {
    if (v >= end) continue;
    Packet<T, width> t = {};
    if constexpr (parts != LABELS) t = load_packet<T, width>(at.t + v);
    store_packet(gradient_packet(r, f, load_packet<T, width>(at.s + v), t), at.grad + v);
  }
  write_label<parts, width>(at, y, l, begin, end, r, f, team);
}

template <int parts, class T, int width>
__global__ void __launch_bounds__(FAST_THREADS, 2)
fast_wide_kernel(const RowDivergence d, bool check, float* __restrict__ loss, T* __restrict__ grads) {
  __shared__ BlockMemory<RowSums> memory;
  BlockTeam<RowSums> team(memory);
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x) {
    const RowLabel y = row_label(d, row, check);
    const FastPointers<T> at(d, grads, row);
    if (y.ignored) {
      if (loss != nullptr && team.rank() == 0) loss[row] = 0;
      write_zeros<T, width>(at.grad, 0, d.V, team);
      continue;
    }
    const AtLabel<T> l = AtLabel<T>::template of<parts>(at, y);
    const float weight = weight_of(d, row, y);
    FastRow<parts> r = fast_row<parts>(d);
    add_range<parts, T, width>(at, 0, d.V, r, team);
    team.join(r);
    write_range<parts, T, width>(at, 0, d.V, y, l, r, weight, d, team);
    write_loss<parts, T, width>(d, at, r, y, weight, l, team, loss == nullptr ? nullptr : loss + row);
  }
}

}  // namespace kdaif
