// bfloat16 and float16 as the CPU and the CUDA kernels read and write them: bits, widened to float32 and narrowed back.
// GPUs have instructions for that; they and the code below give the same bits, NaN apart.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/shared.h"

namespace kdaif {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class To, class From>
KDAIF_SHARED To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

KDAIF_SHARED float widen(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
KDAIF_SHARED float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // moves the exponent bias; exact
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;                       // infinity and NaN
  return bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
KDAIF_SHARED void narrow(float x, bfloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}
KDAIF_SHARED void narrow(float x, float16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lines the last bit of a subnormal half up with the last bit of the float, rounding on the way.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds past the largest half, 65504
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
#endif
}

// What sums over elements of a type are formed in.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

// An element widened to the accumulation type, and narrowed back; for wide types both are the identity.
KDAIF_SHARED float widen(float x) { return x; }
KDAIF_SHARED double widen(double x) { return x; }
KDAIF_SHARED void narrow(float x, float& out) { out = x; }
KDAIF_SHARED void narrow(double x, double& out) { out = x; }


// Two narrowed at once, as they lie in memory: one instruction of a GPU.
template <class T>
KDAIF_SHARED uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (std::is_same_v<T, bfloat16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  T low, high;
  narrow(first, low), narrow(second, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
#endif
}

}  // namespace kdaif
