// row_divergence's common case on the GPU: cross-entropy with labels, and forward KL or cross-entropy with a teacher's
// logits, no options. float32, bfloat16 and float16; everything else is the business of row_divergence.cuh.
//
// Floor: 2 reads and 1 write of V elements, 2 or 3 exponentials an element. Rows that fit into a warp's or a block's
// registers are read once; their exponentials are formed twice, which is cheaper than twice the registers. Wider rows
// are read twice, few and very wide ones by several blocks each.
#pragma once
#include "cuda/row_divergence_common.cuh"
#include "cuda/row_divergence_plan.h"

namespace kdaif {

// What one load instruction brings.
template <class T, int width>
struct alignas(sizeof(T) * width) Packet {
  T x[width];
};

// The threads that share a row.
template <class F>
struct WarpTeam {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) % WARP; }
  __device__ __forceinline__ int size() const { return WARP; }
  template <class Join> __device__ __forceinline__ F reduce(F x) const { return warp_reduce<Join>(x); }
};
template <class F>
struct BlockTeam {
  F* memory;
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }
  template <class Join> __device__ __forceinline__ F reduce(F x) const { return block_reduce<Join>(x, memory); }
};

template <class F>
struct FastRow {
  F inverse, ce, kd, weight;
  bool is_kl, one_temperature;  // at T = 1 both parts need the same softmax
  int64_t label;
  F max_s = lowest<F>(), max_t = lowest<F>();
  F sum_1 = 0, sum_T = 0, sum_t = 0;  // of exp(s - max_s), exp((s - max_s) / T), exp((t - max_t) / T)
  F log_1 = 0, log_T = 0, log_t = 0;

  __device__ __forceinline__ FastRow(const RowDivergence& d, int64_t row, const RowLabel& y)
      : inverse(1 / F(d.temperature)), ce(F(d.ce)), kd(d.teacher == nullptr ? F(0) : F(d.kd)),
        weight(y.legal ? row_weight<F>(d, row) : F(NAN)), is_kl(d.kind == KL), one_temperature(d.temperature == 1),
        label(y.label) {}

  __device__ __forceinline__ bool needs_1() const { return ce != 0 && !(kd != 0 && one_temperature); }

  // With max_s and max_t at hand. Where a maximum is -inf, all logits so far are: `anchor` keeps -inf - -inf away.
  __device__ __forceinline__ static F anchor(F max) { return max == lowest<F>() ? F(0) : max; }
  __device__ __forceinline__ void add_student(F s) {
    const F x = s - anchor(max_s);
    if (needs_1()) sum_1 += exp_of(x);
    if (kd != 0) sum_T += exp_of(x * inverse);
  }
  __device__ __forceinline__ void add(F s, F t) {
    add_student(s);
    if (kd != 0) sum_t += exp_of((t - anchor(max_t)) * inverse);
  }

  // Maxima grow: what was summed up so far must shrink. A sum that is NaN stays NaN.
  __device__ __forceinline__ void raise(F s, F t) {
    if (s > max_s) {
      sum_1 *= exp_of(max_s - s);
      sum_T *= exp_of((max_s - s) * inverse);
      max_s = s;
    }
    if (t > max_t) {
      sum_t *= exp_of((max_t - t) * inverse);
      max_t = t;
    }
  }

  template <class Team>
  __device__ __forceinline__ void join_maxima(const Team& team) {
    const F s = team.template reduce<Max>(max_s), t = kd != 0 ? team.template reduce<Max>(max_t) : max_t;
    raise(s, t);
  }
  template <class Team>
  __device__ __forceinline__ void join_sums(const Team& team) {
    if (needs_1()) sum_1 = team.template reduce<Sum>(sum_1);
    if (kd != 0) {
      sum_T = team.template reduce<Sum>(sum_T);
      sum_t = team.template reduce<Sum>(sum_t);
    }
    log_T = log_of(sum_T), log_t = log_of(sum_t);
    log_1 = needs_1() ? log_of(sum_1) : log_T;
  }

  // The gradient at one class, before the row's weight; adds the class's share of the loss.
  __device__ __forceinline__ F look(F s, F t, bool is_label, bool wants_value, F& value) const {
    F g = 0, q = 0;
    if (kd != 0) {
      const F log_q = (s - max_s) * inverse - log_T, log_p = (t - max_t) * inverse - log_t, p = exp_of(log_p);
      q = exp_of(log_q);
      if (wants_value) value += kd_value(q, log_q, p, log_p, (t - max_t) - (s - max_s));
      g = kd * inverse * (q - p);
    }
    if (ce != 0) {
      const F log_q = (s - max_s) - log_1;
      g += ce * (needs_1() ? exp_of(log_q) : q);
      if (is_label) {
        g -= ce;
        value -= ce * log_q;
      }
    }
    return g;
  }

  // KL takes the difference of the logarithms from the logits, where it is exact.
  __device__ __forceinline__ F kd_value(F q, F log_q, F p, F log_p, F gap) const {
    const TermSettings<F> w{kd, 0, 0, 1, true};
    if (is_kl) return row_term<KL, F, F>(q, 0, p, gap * inverse - (log_t - log_T), w).value;
    return row_term<CROSS_ENTROPY, F, F>(q, log_q, p, log_p, w).value;
  }
};

template <class T, class F, int width>
__device__ __forceinline__ Packet<T, width> load_packet(const T* x, int64_t at) {
  return *reinterpret_cast<const Packet<T, width>*>(x + at);
}

template <class T, int width>
__device__ __forceinline__ void store_packet(const Packet<T, width>& packet, T* x, int64_t at) {
  *reinterpret_cast<Packet<T, width>*>(x + at) = packet;
}

// Hides where a packet's bits came from. Else the compiler keeps a row's widened elements from one pass to the next,
// and runs out of registers.
template <class T, int width>
__device__ __forceinline__ void forget_widened(Packet<T, width>& packet) {
  if constexpr (sizeof(packet) % 4 == 0 && sizeof(T) == 2) {
    uint32_t words[sizeof(packet) / 4];
    std::memcpy(words, &packet, sizeof packet);
#pragma unroll
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
    std::memcpy(&packet, words, sizeof packet);
  }
}

template <class T, int width, class Team>
__device__ __forceinline__ void write_zeros(T* grad, int64_t begin, int64_t end, const Team& team) {
  Packet<T, width> zeros = {};
  if (grad == nullptr) return;
  for (int64_t v = begin + team.rank() * width; v < end; v += team.size() * width) store_packet(zeros, grad, v);
}

// A packet's gradient is written, its share of the loss added.
template <class T, class F, int width>
__device__ __forceinline__ void finish_packet(const FastRow<F>& r, const Packet<T, width>& s, const Packet<T, width>& t,
                                              int64_t v, bool wants_value, F& value, T* grad) {
  Packet<T, width> out;
#pragma unroll
  for (int i = 0; i < width; ++i)
    narrow(r.weight * r.look(widen(s.x[i]), widen(t.x[i]), v + i == r.label, wants_value, value), out.x[i]);
  if (grad != nullptr) store_packet(out, grad, v);
}

// A row kept on chip: packet i of a thread begins at element (i * team + rank) * width.
template <class T, class F, int width, int packets, class Team>
__device__ __forceinline__ void row_on_chip(const T* s, const T* t, T* grad, int64_t V, bool wants_value, FastRow<F>& r,
                                            const Team& team, F& value) {
  Packet<T, width> s_packet[packets], t_packet[packets] = {};
  const int step = team.size() * width, first = team.rank() * width;
#pragma unroll
  for (int i = 0; i < packets; ++i) {
    if (first + i * step >= V) continue;
    s_packet[i] = load_packet<T, F, width>(s, first + i * step);
    if (r.kd != 0) t_packet[i] = load_packet<T, F, width>(t, first + i * step);
  }
#pragma unroll
  for (int i = 0; i < packets; ++i) {
    if (first + i * step >= V) continue;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      r.max_s = Max::join(r.max_s, widen(s_packet[i].x[k]));
      if (r.kd != 0) r.max_t = Max::join(r.max_t, widen(t_packet[i].x[k]));
    }
  }
  r.join_maxima(team);
#pragma unroll
  for (int i = 0; i < packets; ++i) {
    if (first + i * step >= V) continue;
    forget_widened(s_packet[i]);
    forget_widened(t_packet[i]);
#pragma unroll
    for (int k = 0; k < width; ++k) r.add(widen(s_packet[i].x[k]), widen(t_packet[i].x[k]));
  }
  r.join_sums(team);
#pragma unroll
  for (int i = 0; i < packets; ++i) {
    if (first + i * step >= V) continue;
    forget_widened(s_packet[i]);
    forget_widened(t_packet[i]);
    finish_packet(r, s_packet[i], t_packet[i], first + i * step, wants_value, value, grad);
  }
}

// Where the pieces of row lie.
template <class T>
struct FastPointers {
  const T *s, *t;
  T* grad;
  __device__ __forceinline__ FastPointers(const RowDivergence& d, T* grads, int64_t row)
      : s(row_at(static_cast<const T*>(d.student), row, d.student_stride)),
        t(d.teacher == nullptr ? nullptr : row_at(static_cast<const T*>(d.teacher), row, d.teacher_stride)),
        grad(grads == nullptr ? nullptr : row_at(grads, row, d.V)) {}
};

template <class T, class F, int width, int packets, class Team>
__device__ __forceinline__ void whole_row(const RowDivergence& d, bool check, int64_t row, F* loss, T* grads,
                                          const Team& team) {
  const RowLabel y = row_label(d, row, check);
  const FastPointers<T> at(d, grads, row);
  F value = 0;
  if (y.ignored) {
    write_zeros<T, width>(at.grad, 0, d.V, team);
  } else {
    FastRow<F> r(d, row, y);
    row_on_chip<T, F, width, packets>(at.s, at.t, at.grad, d.V, loss != nullptr, r, team, value);
    value = r.weight * team.template reduce<Sum>(value);
  }
  if (loss != nullptr && team.rank() == 0) loss[row] = value;
}

template <class T, class F, int width, int packets>
__global__ void __launch_bounds__(WARPS_IN_BLOCK * WARP, 1)
fast_warp_kernel(const RowDivergence d, bool check, F* __restrict__ loss, T* __restrict__ grads) {
  const int64_t first = int64_t(blockIdx.x) * WARPS_IN_BLOCK + threadIdx.x / WARP;
  for (int64_t row = first; row < d.N; row += int64_t(gridDim.x) * WARPS_IN_BLOCK)
    whole_row<T, F, width, packets>(d, check, row, loss, grads, WarpTeam<F>());
}

template <class T, class F, int width, int packets>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_block_kernel(const RowDivergence d, bool check, F* __restrict__ loss, T* __restrict__ grads) {
  __shared__ F memory[FAST_THREADS / WARP];
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x)
    whole_row<T, F, width, packets>(d, check, row, loss, grads, BlockTeam<F>{memory});
}

// Maxima and sums of a part of a row that is too wide to be kept.
template <class T, class F, int width, class Team>
__device__ __forceinline__ void add_range(const T* s, const T* t, int64_t begin, int64_t end, FastRow<F>& r,
                                          const Team& team) {
  for (int64_t v = begin + team.rank() * width; v < end; v += team.size() * width) {
    const Packet<T, width> a = load_packet<T, F, width>(s, v);
    Packet<T, width> b = {};
    if (r.kd != 0) b = load_packet<T, F, width>(t, v);
    F max_s = lowest<F>(), max_t = lowest<F>();
#pragma unroll
    for (int i = 0; i < width; ++i) {
      max_s = Max::join(max_s, widen(a.x[i]));
      max_t = Max::join(max_t, widen(b.x[i]));
    }
    r.raise(max_s, max_t);
#pragma unroll
    for (int i = 0; i < width; ++i) r.add(widen(a.x[i]), widen(b.x[i]));
  }
}

template <class T, class F, int width, class Team>
__device__ __forceinline__ void finish_range(const T* s, const T* t, T* grad, int64_t begin, int64_t end,
                                             bool wants_value, const FastRow<F>& r, const Team& team, F& value) {
  for (int64_t v = begin + team.rank() * width; v < end; v += team.size() * width) {
    const Packet<T, width> a = load_packet<T, F, width>(s, v);
    Packet<T, width> b = {};
    if (r.kd != 0) b = load_packet<T, F, width>(t, v);
    finish_packet(r, a, b, v, wants_value, value, grad);
  }
}

template <class T, class F, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_wide_kernel(const RowDivergence d, bool check, F* __restrict__ loss, T* __restrict__ grads) {
  __shared__ F memory[FAST_THREADS / WARP];
  const BlockTeam<F> team{memory};
  for (int64_t row = blockIdx.x; row < d.N; row += gridDim.x) {
    const RowLabel y = row_label(d, row, check);
    const FastPointers<T> at(d, grads, row);
    F value = 0;
    if (y.ignored) {
      write_zeros<T, width>(at.grad, 0, d.V, team);
    } else {
      FastRow<F> r(d, row, y);
      add_range<T, F, width>(at.s, at.t, 0, d.V, r, team);
      r.join_maxima(team);
      r.join_sums(team);
      finish_range<T, F, width>(at.s, at.t, at.grad, 0, d.V, loss != nullptr, r, team, value);
      value = r.weight * team.template reduce<Sum>(value);
    }
    if (loss != nullptr && team.rank() == 0) loss[row] = value;
  }
}

// Several blocks a row, in three launches; block (c, row) has chunk c. Chunks are joined in a fixed order: each block
// of the second launch does that anew rather than wait for another.
constexpr int PARTIALS = 5;

template <class T, class F, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_split_sums_kernel(const RowDivergence d, bool check, int64_t chunk, F* __restrict__ partials) {
  __shared__ F memory[FAST_THREADS / WARP];
  const BlockTeam<F> team{memory};
  const int64_t row = blockIdx.y, begin = blockIdx.x * chunk, end = begin + chunk < d.V ? begin + chunk : d.V;
  const RowLabel y = row_label(d, row, check);
  if (y.ignored) return;
  const FastPointers<T> at(d, static_cast<T*>(nullptr), row);
  FastRow<F> r(d, row, y);
  add_range<T, F, width>(at.s, at.t, begin, end, r, team);
  r.join_maxima(team);
  r.join_sums(team);
  if (team.rank() != 0) return;
  F* out = partials + (row * gridDim.x + blockIdx.x) * PARTIALS;
  out[0] = r.max_s, out[1] = r.max_t, out[2] = r.sum_1, out[3] = r.sum_T, out[4] = r.sum_t;
}

template <class T, class F, int width>
__global__ void __launch_bounds__(FAST_THREADS, 1)
fast_split_terms_kernel(const RowDivergence d, int64_t chunk, const F* __restrict__ partials, F* __restrict__ values,
                        T* __restrict__ grads) {
  __shared__ F memory[FAST_THREADS / WARP];
  const BlockTeam<F> team{memory};
  const int64_t row = blockIdx.y, begin = blockIdx.x * chunk, end = begin + chunk < d.V ? begin + chunk : d.V;
  const RowLabel y = row_label(d, row, false);
  const FastPointers<T> at(d, grads, row);
  F value = 0;
  if (y.ignored) {
    write_zeros<T, width>(at.grad, begin, end, team);
  } else {
    FastRow<F> r(d, row, y);
    if (team.rank() < static_cast<int>(gridDim.x)) {
      const F* in = partials + (row * gridDim.x + team.rank()) * PARTIALS;
      r.max_s = in[0], r.max_t = in[1], r.sum_1 = in[2], r.sum_T = in[3], r.sum_t = in[4];
    }
    r.join_maxima(team);
    r.join_sums(team);
    finish_range<T, F, width>(at.s, at.t, at.grad, begin, end, values != nullptr, r, team, value);
    value = r.weight * team.template reduce<Sum>(value);
  }
  if (values != nullptr && team.rank() == 0) values[row * gridDim.x + blockIdx.x] = value;
}

template <class F>
__global__ void __launch_bounds__(WARP)
fast_split_loss_kernel(int chunks, const F* __restrict__ values, F* __restrict__ loss) {
  F value = 0;
  for (int c = threadIdx.x; c < chunks; c += WARP) value += values[int64_t(blockIdx.x) * chunks + c];
  value = warp_reduce<Sum>(value);
  if (threadIdx.x == 0) loss[blockIdx.x] = value;
}

}  // namespace kdaif
