// Small functions that a compiler turns into vector code inside a plain loop: no intrinsics, one source for SSE2, AVX2,
// AVX-512 and NEON. All are forced inline, for the reason given in common/shared.h.
#pragma once
#include <cstdint>

#include "common/half.h"

#define KDAIF_INLINE static inline __attribute__((always_inline))

namespace kdaif {

// 2^t for t <= 0; 0 below the smallest normal number. Polynomials of least maximal relative error on
// [-1/2, 1/2] (Remez): 1.9e-9 and 3.1e-18, so rounding dominates: below 2 ulp.
// NaN gives NaN only if its low bits are 0, else whatever the integer addition makes of them: rows look for NaN before.
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

}  // namespace kdaif
