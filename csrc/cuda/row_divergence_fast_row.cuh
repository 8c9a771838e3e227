// One row of row_divergence's common case: sums in one look, gradient in a second. What tells this from the general
// kernels is the price of an element. Everything is in units of log 2, so that an exponential is one multiply-add and
// one instruction: exp((s - anchor) / T) = exp2(s * scale - base), base = anchor * scale.
//
// Sums are relative to an anchor instead of the maximum. A thread's anchor is the maximum of its first elements; it moves
// only where a later one lies so far above that sums could overflow. The value of the divergence is
//   sum p (x_t - x_s) - log(sum_t / sum_T),
// formed with the sums. Where that is small or not finite, the row is looked at once more, term by term.
#pragma once
#include <type_traits>

#include "cuda/row_divergence_common.cuh"
#include "cuda/row_divergence_plan.h"

namespace kdaif {

// What one load instruction brings, as whole words where it can be: of 16-bit elements, each would get a register.
template <class T, int width>
struct alignas(sizeof(T) * width) Packet {
  static constexpr bool in_words = sizeof(T) * width % 4 == 0;
  using Word = std::conditional_t<in_words, uint32_t, T>;
  static constexpr int length = static_cast<int>(sizeof(T) * width / sizeof(Word));

  Word words[length];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (!in_words) return widen(words[i]);
    else if constexpr (sizeof(T) == 4) return bit_cast<float>(words[i]);
    else if constexpr (std::is_same_v<T, bfloat16>)
      return bit_cast<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    else return widen(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
  }

  static __device__ __forceinline__ Packet of(const float (&x)[width]) {
    Packet packet;
#pragma unroll
    for (int i = 0; i < length; ++i) {
      if constexpr (!in_words) narrow(x[i], packet.words[i]);
      else if constexpr (sizeof(T) == 4) packet.words[i] = bit_cast<uint32_t>(x[i]);
      else packet.words[i] = narrow_pair<T>(x[2 * i], x[2 * i + 1]);
    }
    return packet;
  }
};

template <class T, int width>
__device__ __forceinline__ Packet<T, width> load_packet(const T* x) {
  return *reinterpret_cast<const Packet<T, width>*>(x);
}

template <class T, int width>
__device__ __forceinline__ void store_packet(const Packet<T, width>& packet, T* x) {
  *reinterpret_cast<Packet<T, width>*>(x) = packet;
}

// Hides where a packet's bits came from. Else the compiler keeps a row's widened elements, or what it made of them, from
// one look to the next, and runs out of registers.
template <class T, int width>
__device__ __forceinline__ void forget_widened(Packet<T, width>& packet) {
  if constexpr (Packet<T, width>::in_words) {
#pragma unroll
    for (uint32_t& word : packet.words) asm volatile("" : "+r"(word));
  }
}

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr float ROOM = 32;             // powers of 2 between an anchor and what makes it move
// Times `room`: no anchor is lower, so that what rounding leaves of s * scale - base, at most 64, makes no sum overflow.
// Logits that lie so far down, such as those of a mask, have the exponential 0.
constexpr float LOWEST_ANCHOR = -0x1p26f;
constexpr float SMALL = 1.0f / 64;     // as in row_stats: below it, a difference of sums has lost too many digits

__device__ __forceinline__ float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// The same on the multiply-add units, for x <= ROOM: the 16 exponentials a clock of a multiprocessor are too few where
// an element needs six. exp2 of the nearest integer goes into the exponent, a polynomial takes the rest; relative error
// 3e-7. NaN is lost: another exponential of the same element must carry it.
__device__ __forceinline__ float exp2_by_polynomial(float x) {
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: a sum with it has no digits after the point
  x = fmaxf(x, -127.0f);                // there the result is 0
  const float shifted = x + round, rest = x - (shifted - round);
  float y = 1.32647e-3f;
  y = y * rest + 9.67151e-3f;
  y = y * rest + 5.550734e-2f;
  y = y * rest + 2.4022242e-1f;
  y = y * rest + 6.9314698e-1f;
  y = y * rest + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(y) + (bit_cast<uint32_t>(shifted) << 23));
}

// What a row's loss consists of: at T = 1 both parts need the same softmax, at T = 2 the exponentials of one are the
// squares of the other's. And of what a curvature product: one softmax of the student, or two.
enum Parts : int { LABELS, TEACHER, BOTH_AT_1, BOTH_AT_2, BOTH, ONE_SOFTMAX, TWO_SOFTMAXES };

// Sums of a row or a part of it. x_s is at the row's T, and with two softmaxes also at 1.
struct RowSums {
  float anchor_s = lowest<float>(), anchor_t = lowest<float>();
  float sum_1 = 0, sum_s = 0, sum_t = 0;  // of exp2(x_s) at T = 1 and at T, and of exp2(x_t)
  float gaps = 0;                         // of exp2(x_t) (x_t - x_s), or of exp2(x_t) (-x_s)
};
constexpr int ROW_SUMS = 6;
static_assert(sizeof(RowSums) == ROW_SUMS * sizeof(float));

// What sums are multiplied by when an anchor moves.
struct Factors {
  float of_1, of_s;
};

template <int parts>
struct FastRow {
  static constexpr bool has_teacher = TEACHER <= parts && parts <= BOTH;
  static constexpr bool has_1 = parts == BOTH_AT_2 || parts == BOTH || parts == TWO_SOFTMAXES;

  float scale_s, scale_1;  // log2(e) / T and at T = 1
  float kl;                // 1 for the divergence, 0 for the cross-entropy with the teacher
  float room;              // in logits
  RowSums sums;
  float base_s = 0, base_1 = 0, base_t = 0, limit_s, limit_t;

  __device__ __forceinline__ FastRow(const RowDivergence& d, float temperature)
      : scale_s(LOG2_E / temperature), scale_1(LOG2_E), kl(d.kind == KL ? 1 : 0),
        room(ROOM / (has_1 ? fmaxf(scale_s, scale_1) : scale_s)), limit_s(LOWEST_ANCHOR * room), limit_t(limit_s) {}

  // Moves the anchors up, or, where nothing was finite so far, to their first value: base stays finite, so that -inf
  // is subtracted from nothing. Logits below the first limit have the exponential 0 without an anchor.
  __device__ __forceinline__ Factors move_student(float anchor) {
    const float base = anchor * scale_s, shift = base - base_s;
    Factors f{1, 1};
    if (sums.anchor_s != lowest<float>()) {
      f.of_s = exp2_of(-shift);
      if (has_1) f.of_1 = exp2_of(base_1 - anchor * scale_1);
    }
    sums.sum_s *= f.of_s;
    if (has_1) sums.sum_1 *= f.of_1;
    if (has_teacher) sums.gaps += shift * sums.sum_t;
    sums.anchor_s = anchor, base_s = base, base_1 = anchor * scale_1, limit_s = anchor + room;
    return f;
  }
  __device__ __forceinline__ void move_teacher(float anchor) {
    const float base = anchor * scale_s, shift = base - base_t;
    if (sums.anchor_t != lowest<float>()) {
      const float factor = exp2_of(-shift);
      sums.gaps = factor * (sums.gaps - kl * shift * sums.sum_t);
      sums.sum_t *= factor;
    }
    sums.anchor_t = anchor, base_t = base, limit_t = anchor + room;
  }

  // Takes up sums that other threads, or other blocks, have formed.
  __device__ __forceinline__ void take(const RowSums& others) {
    sums = others;
    base_s = sums.anchor_s == lowest<float>() ? 0 : sums.anchor_s * scale_s;
    base_1 = sums.anchor_s == lowest<float>() ? 0 : sums.anchor_s * scale_1;
    base_t = sums.anchor_t == lowest<float>() ? 0 : sums.anchor_t * scale_s;
  }

  __device__ __forceinline__ float exponent_s(float s) const { return s * scale_s - base_s; }
  __device__ __forceinline__ float exponent_1(float s) const { return s * scale_1 - base_1; }
  __device__ __forceinline__ float exponent_t(float t) const { return t * scale_s - base_t; }

  // exp at T = 1 of element i, whose exponential at T is e. Every fourth one is a polynomial: that loads both kinds of
  // units alike.
  template <int i>
  __device__ __forceinline__ float exp_1(float s, float e) const {
    if (parts == BOTH_AT_2) return e * e;
    return i % 4 == 3 ? exp2_by_polynomial(exponent_1(s)) : exp2_of(exponent_1(s));
  }

  template <class T, int width>
  __device__ __forceinline__ void add(const Packet<T, width>& s, const Packet<T, width>& t) {
    float max_s = s[0], max_t = has_teacher ? t[0] : 0;
#pragma unroll
    for (int i = 1; i < width; ++i) {
      max_s = fmaxf(max_s, s[i]);  // not NaN, if there is another: the sums carry it
      if (has_teacher) max_t = fmaxf(max_t, t[i]);
    }
    if (max_s > limit_s || (has_teacher && max_t > limit_t)) {
      if (max_s > limit_s) move_student(max_s);
      if (has_teacher && max_t > limit_t) move_teacher(max_t);
    }
    add_elements<T, width, 0>(s, t);
  }

  // The elements one by one, with their places as constants.
  template <class T, int width, int i>
  __device__ __forceinline__ void add_elements(const Packet<T, width>& s, const Packet<T, width>& t) {
    if constexpr (i < width) {
      const float logit = s[i], x_s = exponent_s(logit), e = exp2_of(x_s);
      sums.sum_s += e;
      if constexpr (has_1) sums.sum_1 += exp_1<i>(logit, e);
      if constexpr (has_teacher) {
        const float x_t = exponent_t(t[i]), p = exp2_of(x_t);
        sums.sum_t += p;
        sums.gaps += p * (kl * x_t - x_s);
      }
      add_elements<T, width, i + 1>(s, t);
    }
  }

  // All lanes get the sums over all lanes.
  __device__ __forceinline__ void join_warp() {
    join_student();
    if (has_teacher) {
      const float anchor_t = warp_reduce<Max>(sums.anchor_t);
      if (anchor_t != sums.anchor_t) move_teacher(anchor_t);
    }
    if (has_teacher) sums.sum_t = warp_reduce<Sum>(sums.sum_t), sums.gaps = warp_reduce<Sum>(sums.gaps);
  }
  __device__ __forceinline__ Factors join_student() {
    const float anchor = warp_reduce<Max>(sums.anchor_s);
    Factors f{1, 1};
    if (anchor != sums.anchor_s) f = move_student(anchor);
    sums.sum_s = warp_reduce<Sum>(sums.sum_s);
    if (has_1) sums.sum_1 = warp_reduce<Sum>(sums.sum_1);
    return f;
  }
};

// What the gradient's elements have in common: weight (ce q_1 + kd / T (q - p)), as factors of exponentials.
template <int parts>
struct GradientFactors {
  float of_1 = 0, of_s = 0, of_t = 0, of_label = 0;

  __device__ __forceinline__ GradientFactors(const RowDivergence& d, const FastRow<parts>& r, float weight) {
    const float ce = weight * float(d.ce), kd = weight * float(d.kd) / float(d.temperature);
    const float inverse_s = reciprocal(r.sums.sum_s);
    of_s = inverse_s * (parts == LABELS ? ce : parts == BOTH_AT_1 ? ce + kd : kd);
    if (r.has_1) of_1 = ce * reciprocal(r.sums.sum_1);
    if (r.has_teacher) of_t = kd * reciprocal(r.sums.sum_t);
    if (parts != TEACHER) of_label = ce;
  }
};

// Without the label's own part.
template <int parts, class T, int width, int i = 0>
__device__ __forceinline__ void gradients(const FastRow<parts>& r, const GradientFactors<parts>& f,
                                          const Packet<T, width>& s, const Packet<T, width>& t, float (&g)[width]) {
  if constexpr (i < width) {
    const float logit = s[i], e = exp2_of(r.exponent_s(logit));
    g[i] = f.of_s * e;
    if constexpr (FastRow<parts>::has_teacher) g[i] -= f.of_t * exp2_of(r.exponent_t(t[i]));
    if constexpr (FastRow<parts>::has_1) g[i] += f.of_1 * r.template exp_1<i>(logit, e);
    gradients<parts, T, width, i + 1>(r, f, s, t, g);
  }
}

template <int parts, class T, int width>
__device__ __forceinline__ Packet<T, width> gradient_packet(const FastRow<parts>& r, const GradientFactors<parts>& f,
                                                            const Packet<T, width>& s, const Packet<T, width>& t) {
  float g[width];
  gradients<parts, T, width>(r, f, s, t, g);
  return Packet<T, width>::of(g);
}

}  // namespace kdaif
