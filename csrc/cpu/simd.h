// Small functions that a compiler turns into vector code inside a plain loop: no intrinsics, one source for SSE2, AVX2,
// AVX-512 and NEON. All are forced inline, since the same code is compiled for several instruction sets and a shared
// out-of-line copy would be the wrong one for some CPU.
#pragma once
#include <cstdint>
#include <cstring>

#define KDAIF_INLINE static inline __attribute__((always_inline))

namespace kdaif {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class To, class From>
KDAIF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// 2^t for t <= 0; 0 below the smallest normal number, NaN for NaN. Polynomials of least maximal relative error on
// [-1/2, 1/2] (Remez): 1.9e-9 and 3.1e-18, so rounding dominates: below 2 ulp.
// Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves that integer in the low bits, which needs neither a
// rounding nor a conversion instruction (SSE2 has no vector form of either).
KDAIF_INLINE float exp2_nonpositive(float t) {
  constexpr float lowest = -125.0f, magic = 12582912.0f;
  const float clamped = t < lowest ? lowest : t;
  const float shifted = clamped + magic;
  const float r = clamped - (shifted - magic);
  float p = 1.534581215874e-4f;
  p = p * r + 1.339993120947e-3f;
  p = p * r + 9.618488956523e-3f;
  p = p * r + 5.550328776998e-2f;
  p = p * r + 2.402264689064e-1f;
  p = p * r + 6.931472057373e-1f;
  p = p * r + 1.0f;
  const float power = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
  return t < lowest ? 0.0f : power;
}
KDAIF_INLINE double exp2_nonpositive(double t) {
  constexpr double lowest = -1021.0, magic = 6755399441055744.0;
  const double clamped = t < lowest ? lowest : t;
  const double shifted = clamped + magic;
  const double r = clamped - (shifted - magic);
  double p = 4.435280944610336161e-10;
  p = p * r + 7.074105626245659371e-9;
  p = p * r + 1.017819803332852766e-7;
  p = p * r + 1.321543308959462904e-6;
  p = p * r + 1.52527334899608046e-5;
  p = p * r + 1.540353046251461303e-4;
  p = p * r + 1.333355814678995032e-3;
  p = p * r + 9.618129107588335083e-3;
  p = p * r + 5.550410866481992148e-2;
  p = p * r + 2.40226506959101562e-1;
  p = p * r + 6.931471805599453305e-1;
  p = p * r + 1.0;
  const double power = bit_cast<double>(bit_cast<uint64_t>(p) + (bit_cast<uint64_t>(shifted) << 52));
  return t < lowest ? 0.0 : power;
}

KDAIF_INLINE float widen(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
KDAIF_INLINE float widen(float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // moves the exponent bias; exact
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;                       // infinity and NaN
  return bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
KDAIF_INLINE void narrow(float x, bfloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0u : rounded);
}
KDAIF_INLINE void narrow(float x, float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lines the last bit of a subnormal half up with the last bit of the float, rounding on the way.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds past the largest half, 65504
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace kdaif
