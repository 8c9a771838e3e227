// Vectors of float or double as wide as the instruction set that this file is compiled for, and what the row loops do
// with them. One source for SSE2, AVX2, AVX-512 and NEON: arithmetic is the compiler's own on vector types, and only
// where one instruction saves many are there intrinsics. All is forced inline and in an unnamed namespace, since several
// copies of it, differently compiled, end up in one library. Include this before common/row_divergence_math.h, which is
// to find the functions here.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/half.h"

#if defined(__AVX512F__)
#pragma GCC diagnostic push  // GCC's own header leaves operands undefined on purpose, and its warnings do not know
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define KDAIF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KDAIF_VECTOR_BYTES 32
#else
#define KDAIF_VECTOR_BYTES 16
#endif

#define KDAIF_INLINE static inline __attribute__((always_inline))

namespace kdaif {
namespace {

typedef float Floats __attribute__((vector_size(KDAIF_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(KDAIF_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(KDAIF_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(KDAIF_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(KDAIF_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(KDAIF_VECTOR_BYTES / 2)));

template <class F> struct VectorOf;
template <> struct VectorOf<float> { using type = Floats; };
template <> struct VectorOf<double> { using type = Doubles; };
template <class F> using Vec = typename VectorOf<F>::type;
template <class F> constexpr int64_t LANES = KDAIF_VECTOR_BYTES / sizeof(F);

KDAIF_INLINE Floats select(Ints condition, Floats a, Floats b) { return condition ? a : b; }
KDAIF_INLINE Doubles select(Longs condition, Doubles a, Doubles b) { return condition ? a : b; }
KDAIF_INLINE Floats max_of(Floats a, Floats b) { return a > b ? a : b; }
KDAIF_INLINE Doubles max_of(Doubles a, Doubles b) { return a > b ? a : b; }
KDAIF_INLINE Floats abs_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
KDAIF_INLINE Doubles abs_of(Doubles x) { return (Doubles)((Longs)x & 0x7fffffffffffffff); }
template <class F> KDAIF_INLINE Vec<F> all(F x) { return Vec<F>{} + x; }

// --- loading and storing: whole vectors, or the first n lanes of one ------------------------------------------------

template <class V, class T> KDAIF_INLINE V copy_in(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

KDAIF_INLINE Floats widen(Halves bits, bfloat16) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }
KDAIF_INLINE Floats widen(Halves bits, float16) {  // as in common/half.h
  const Words wide = __builtin_convertvector(bits, Words), magnitude = (wide & 0x7fff) << 13;
  const Words number = (Words)((Floats)magnitude * 0x1p112f);
  const Words special = (Words)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Floats)(number | special | (wide & 0x8000) << 16);
}
// Rounded to bfloat16, which is the upper half of each word; the lower half is anything.
KDAIF_INLINE Words round_to_upper(Floats x) {
  const Words bits = (Words)x, is_nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~is_nan) | (is_nan & 0x7fc00000u);
}
#if defined(__AVX512BF16__)
KDAIF_INLINE Halves narrow(Floats x, bfloat16) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
#else
KDAIF_INLINE Halves narrow(Floats x, bfloat16) { return __builtin_convertvector(round_to_upper(x) >> 16, Halves); }
#endif
KDAIF_INLINE Halves narrow(Floats x, float16) {
  const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? (Words{} + 0x7c00u) : half;
  half = magnitude > 0x7f800000u ? (Words{} + 0x7e00u) : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
}

KDAIF_INLINE Floats load(const float* p) { return copy_in<Floats>(p); }
KDAIF_INLINE Doubles load(const double* p) { return copy_in<Doubles>(p); }
KDAIF_INLINE Floats load(const bfloat16* p) { return widen(copy_in<Halves>(p), bfloat16{}); }
KDAIF_INLINE Floats load(const float16* p) { return widen(copy_in<Halves>(p), float16{}); }
KDAIF_INLINE void store(Floats x, float* p) { std::memcpy(p, &x, sizeof x); }
KDAIF_INLINE void store(Doubles x, double* p) { std::memcpy(p, &x, sizeof x); }
template <class T> KDAIF_INLINE void store(Floats x, T* p) {
  const Halves bits = narrow(x, T{});
  std::memcpy(p, &bits, sizeof bits);
}

#if defined(__AVX512F__)
KDAIF_INLINE Floats load(const float* p, int64_t n, float fill) {
  return (Floats)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
KDAIF_INLINE Doubles load(const double* p, int64_t n, double fill) {
  return (Doubles)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p);
}
template <class T> KDAIF_INLINE Floats load(const T* p, int64_t n, float fill) {
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  const Halves bits = (Halves)_mm256_maskz_loadu_epi16(first, p);
  return (Floats)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first, (__m512)widen(bits, T{}));
}
KDAIF_INLINE void store(Floats x, float* p, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x); }
KDAIF_INLINE void store(Doubles x, double* p, int64_t n) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)x); }
template <class T> KDAIF_INLINE void store(Floats x, T* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)narrow(x, T{}));
}
#else
template <class T, class F = typename Accumulate<T>::type> KDAIF_INLINE Vec<F> load(const T* p, int64_t n, F fill) {
  F lanes[LANES<F>];
  for (int64_t i = 0; i < LANES<F>; ++i) lanes[i] = i < n ? F(kdaif::widen(p[i < n ? i : 0])) : fill;
  return copy_in<Vec<F>>(lanes);
}
template <class X, class T> KDAIF_INLINE void store(X x, T* p, int64_t n) {
  typename Accumulate<T>::type lanes[sizeof(X) / sizeof(x[0])];
  std::memcpy(lanes, &x, sizeof x);
  for (int64_t i = 0; i < n; ++i) kdaif::narrow(lanes[i], p[i]);
}
#endif

// Two vectors of bfloat16 lie in memory as one of words: the elements with even index are the lower halves, those with
// odd index the upper ones. Taken apart so, they need no widening instruction.
KDAIF_INLINE Floats load_even(const bfloat16* p) { return (Floats)(copy_in<Words>(p) << 16); }
KDAIF_INLINE Floats load_odd(const bfloat16* p) { return (Floats)(copy_in<Words>(p) & 0xffff0000u); }
KDAIF_INLINE void store_even_odd(Floats even, Floats odd, bfloat16* p) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // the even ones first, then the odd ones
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                              5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i words = _mm512_permutexvar_epi16(interleave, both);
#else
  const Words words = (round_to_upper(odd) & 0xffff0000u) | (round_to_upper(even) >> 16);
#endif
  std::memcpy(p, &words, sizeof words);
}

// A whole vector, or the last and shorter one of a row.
struct Whole {
  template <class F> KDAIF_INLINE Vec<F> inside(F) { return all(F(1)); }  // 1 in the lanes of the row, 0 beyond its end
  template <class T> KDAIF_INLINE auto get(const T* p, typename Accumulate<T>::type) { return load(p); }
  template <class X, class T> KDAIF_INLINE void put(X x, T* p) { store(x, p); }
};
struct Start {
  int64_t n;
  template <class F> __attribute__((always_inline)) Vec<F> inside(F) const {
    Vec<F> ones{};
    for (int64_t i = 0; i < LANES<F>; ++i) ones[i] = i < n ? F(1) : F(0);
    return ones;
  }
  template <class T> __attribute__((always_inline)) auto get(const T* p, typename Accumulate<T>::type fill) const { return load(p, n, fill); }
  template <class X, class T> __attribute__((always_inline)) void put(X x, T* p) const { store(x, p, n); }
};

// Calls body(v, part) for every vector that begins at element v of a row of `count` elements.
template <class F, class Body> KDAIF_INLINE void for_vectors(int64_t count, Body body) {
  int64_t v = 0;
  for (; v + LANES<F> <= count; v += LANES<F>) body(v, Whole{});
  if (v < count) body(v, Start{count - v});
}

// The same for a row of T whose vectors may come in another order: for bfloat16, the elements with even index of two
// vectors' worth, then those with odd index. `place` says where an element has gone.
struct Even {
  KDAIF_INLINE Floats get(const bfloat16* p, float) { return load_even(p); }
};
struct Odd {
  KDAIF_INLINE Floats get(const bfloat16* p, float) { return load_odd(p - LANES<float>); }
};
template <class F, class T, class Body> KDAIF_INLINE void for_vectors_of(int64_t count, Body body) {
  int64_t first = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    for (; first + 2 * LANES<F> <= count; first += 2 * LANES<F>) body(first, Even{}), body(first + LANES<F>, Odd{});
  }
  for_vectors<F>(count - first, [&](int64_t v, auto part) __attribute__((always_inline)) { body(first + v, part); });
}
template <class T> KDAIF_INLINE int64_t place(int64_t element, int64_t count) {
  using F = typename Accumulate<T>::type;
  constexpr int64_t pair = 2 * LANES<F>;
  if (!std::is_same_v<T, bfloat16> || element >= count / pair * pair) return element;
  return element / pair * pair + element % pair / 2 + element % 2 * LANES<F>;
}
// Stores a row of which value(v, part) gives the vectors.
template <class F, class T, class Value> KDAIF_INLINE void store_vectors(T* out, int64_t count, Value value) {
  int64_t first = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    for (; first + 2 * LANES<F> <= count; first += 2 * LANES<F>)
      store_even_odd(value(first), value(first + LANES<F>), out + first);
  }
  for_vectors<F>(count - first, [&](int64_t v, auto part) __attribute__((always_inline)) { part.put(value(first + v), out + first + v); });
}

// --- over the lanes, always in the same order --------------------------------------------------------------------------

template <class F, class X, class Join> KDAIF_INLINE F fold(X x, Join join) {
  F lanes[sizeof(X) / sizeof(F)];
  std::memcpy(lanes, &x, sizeof x);
  for (int64_t half = sizeof(X) / sizeof(F) / 2; half >= 1; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
  return lanes[0];
}
#if defined(__AVX512F__)
KDAIF_INLINE float sum_of(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
KDAIF_INLINE double sum_of(Doubles x) { return _mm512_reduce_add_pd((__m512d)x); }
KDAIF_INLINE float largest_of(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
KDAIF_INLINE double largest_of(Doubles x) { return _mm512_reduce_max_pd((__m512d)x); }
#else
KDAIF_INLINE float sum_of(Floats x) { return fold<float>(x, [](float a, float b) { return a + b; }); }
KDAIF_INLINE double sum_of(Doubles x) { return fold<double>(x, [](double a, double b) { return a + b; }); }
KDAIF_INLINE float largest_of(Floats x) { return fold<float>(x, [](float a, float b) { return a > b ? a : b; }); }
KDAIF_INLINE double largest_of(Doubles x) { return fold<double>(x, [](double a, double b) { return a > b ? a : b; }); }
#endif

// --- exponential and logarithm -----------------------------------------------------------------------------------------

// 2^r on [-1/2, 1/2], polynomials of least maximal relative error (Remez): 1.9e-9 and 3.1e-18, so rounding dominates.
KDAIF_INLINE Floats exp2_fraction(Floats r) {
  Floats p = 1.534581215874e-4f * r + 1.339993120947e-3f;
  p = p * r + 9.618488956523e-3f;
  p = p * r + 5.550328776998e-2f;
  p = p * r + 2.402264689064e-1f;
  p = p * r + 6.931472057373e-1f;
  return p * r + 1.0f;
}
KDAIF_INLINE Doubles exp2_fraction(Doubles r) {
  Doubles p = 4.435280944610336161e-10 * r + 7.074105626245659371e-9;
  p = p * r + 1.017819803332852766e-7;
  p = p * r + 1.321543308959462904e-6;
  p = p * r + 1.52527334899608046e-5;
  p = p * r + 1.540353046251461303e-4;
  p = p * r + 1.333355814678995032e-3;
  p = p * r + 9.618129107588335083e-3;
  p = p * r + 5.550410866481992148e-2;
  p = p * r + 2.40226506959101562e-1;
  p = p * r + 6.931471805599453305e-1;
  return p * r + 1.0;
}

// The same for results that will be rounded to 8 or 11 bits: 2.8e-6, and 1 for 0.
KDAIF_INLINE Floats coarse_exp2_fraction(Floats r) {
  Floats p = 9.58285e-3f * r + 5.590642e-2f;
  p = p * r + 2.4024099e-1f;
  p = p * r + 6.9312419e-1f;
  return p * r + 1.0f;
}

// 2^t for t <= 0; NaN for NaN.
#if defined(__AVX512F__)
template <bool COARSE = false> KDAIF_INLINE Floats exp2_of(Floats t) {
  const Floats r = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)t, 0);  // t - round(t), 0 for -inf
  const Floats p = COARSE ? coarse_exp2_fraction(r) : exp2_fraction(r);
  return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(t - r));
}
template <bool COARSE = false> KDAIF_INLINE Doubles exp2_of(Doubles t) {
  const Doubles r = (Doubles)_mm512_maskz_reduce_pd(0xff, (__m512d)t, 0);
  return (Doubles)_mm512_maskz_scalef_pd(0xff, (__m512d)exp2_fraction(r), (__m512d)(t - r));
}
#else
// Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves that integer in the low bits, which needs neither a
// rounding nor a conversion instruction (SSE2 has no vector form of either). Below the smallest normal number: 0.
template <bool COARSE = false> KDAIF_INLINE Floats exp2_of(Floats t) {
  constexpr float lowest = -125.0f, magic = 12582912.0f;
  const Floats clamped = t < lowest ? all(lowest) : t, shifted = clamped + magic, r = clamped - (shifted - magic);
  const Floats p = COARSE ? coarse_exp2_fraction(r) : exp2_fraction(r);
  const Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
  return t < lowest ? Floats{} : t == t ? power : t;
}
template <bool COARSE = false> KDAIF_INLINE Doubles exp2_of(Doubles t) {
  constexpr double lowest = -1021.0, magic = 6755399441055744.0;
  const Doubles clamped = t < lowest ? all(lowest) : t, shifted = clamped + magic;
  const Doubles p = exp2_fraction(clamped - (shifted - magic));
  const Doubles power = (Doubles)((Longs)p + ((Longs)shifted << 52));
  return t < lowest ? Doubles{} : t == t ? power : t;
}
#endif

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
KDAIF_INLINE Floats exp_of(Floats x) { return exp2_of(x * float(LOG2_E)); }
KDAIF_INLINE Doubles exp_of(Doubles x) { return exp2_of(x * LOG2_E); }

// The natural logarithm of x >= 0: x = 2^e m with m from sqrt(1/2) to sqrt(2), log m = 2 artanh((m - 1) / (m + 1)).
// Subnormal numbers count as the smallest normal one.
template <class X> KDAIF_INLINE X log_of_floats(X x) {
  using I = decltype(x == x);
  const X smallest = X{} + 1.17549435e-38f;
  const I bits = (I)(x > smallest ? x : smallest), e = (bits - 0x3f3504f3) >> 23;
  const X m = (X)(bits - (e << 23)), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  X p = float(2.0 / 9) * z + float(2.0 / 7);
  p = p * z + float(2.0 / 5);
  p = p * z + float(2.0 / 3);
  p = p * z + 2.0f;
  const X value = __builtin_convertvector(e, X) * float(LN_2) + p * s;
  return x == 0.0f ? X{} - __builtin_inff() : x < __builtin_inff() ? value : x;
}
template <class X> KDAIF_INLINE X log_of_doubles(X x) {
  using I = decltype(x == x);
  const X smallest = X{} + 2.2250738585072014e-308;
  const I bits = (I)(x > smallest ? x : smallest), e = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const X m = (X)(bits - (e << 52)), s = (m - 1.0) / (m + 1.0), z = s * s;
  X p = 2.0 / 21 * z + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  p = p * z + 2.0;
  const X value = __builtin_convertvector(e, X) * LN_2 + p * s;
  return x == 0.0 ? X{} - __builtin_inf() : x < __builtin_inf() ? value : x;
}
KDAIF_INLINE Floats log_of(Floats x) { return log_of_floats(x); }
KDAIF_INLINE Doubles log_of(Doubles x) { return log_of_doubles(x); }

// --- four numbers of a row at once: a division or a logarithm of four costs what one does -------------------------------

typedef float FourFloats __attribute__((vector_size(16)));
typedef double FourDoubles __attribute__((vector_size(32)));
template <class F> struct FourOf;
template <> struct FourOf<float> { using type = FourFloats; };
template <> struct FourOf<double> { using type = FourDoubles; };
template <class F> using Four = typename FourOf<F>::type;

KDAIF_INLINE FourFloats log_of_four(FourFloats x) { return log_of_floats(x); }
KDAIF_INLINE FourDoubles log_of_four(FourDoubles x) { return log_of_doubles(x); }

#if defined(__AVX512F__)
KDAIF_INLINE FourFloats sums_of(Floats a, Floats b, Floats c, Floats d) {
  const auto half = [](Floats x) __attribute__((always_inline)) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  };
  const __m256 ab = _mm256_hadd_ps(half(a), half(b)), cd = _mm256_hadd_ps(half(c), half(d));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  return (FourFloats)_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}
#else
KDAIF_INLINE FourFloats sums_of(Floats a, Floats b, Floats c, Floats d) { return FourFloats{sum_of(a), sum_of(b), sum_of(c), sum_of(d)}; }
#endif
KDAIF_INLINE FourDoubles sums_of(Doubles a, Doubles b, Doubles c, Doubles d) { return FourDoubles{sum_of(a), sum_of(b), sum_of(c), sum_of(d)}; }

}  // namespace
}  // namespace kdaif
