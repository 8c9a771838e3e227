// Which instruction set the row loops run with: the best that was compiled and this CPU has, chosen once.
#pragma once
#include <cstdlib>
#include <cstring>

namespace kdaif {

enum class Level { baseline, avx2, avx512, avx512bf16 };  // each has what the one before has
constexpr const char* LEVEL_NAMES[] = {"baseline", "avx2", "avx512", "avx512bf16"};

inline Level best_level() {
#if defined(KDAIF_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(KDAIF_AVX512BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Level::avx512bf16;
#endif
  return avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::baseline;
#else
  return Level::baseline;
#endif
}

// KDAIF_CPU_LEVEL lowers the choice, so that every level can be tested on one machine; it never raises it.
inline Level choose_level() {
  const Level best = best_level();
  const char* wanted = std::getenv("KDAIF_CPU_LEVEL");
  for (int i = 0; wanted != nullptr && i < static_cast<int>(best); ++i)
    if (!std::strcmp(wanted, LEVEL_NAMES[i])) return static_cast<Level>(i);
  return best;
}

inline Level level() {
  static const Level chosen = choose_level();
  return chosen;
}

inline const char* level_name() { return LEVEL_NAMES[static_cast<int>(level())]; }

}  // namespace kdaif

// Calls the copy of `function` that was compiled for the chosen level.
#if defined(KDAIF_AVX512BF16)
#define KDAIF_BEST_LEVEL avx512bf16
#else
#define KDAIF_BEST_LEVEL avx512
#endif
#if defined(KDAIF_X86_LEVELS)
#define KDAIF_CALL_LEVEL(function, ...)                                                                \
  switch (::kdaif::level()) {                                                                          \
    case ::kdaif::Level::avx512bf16: ::kdaif::KDAIF_BEST_LEVEL::function(__VA_ARGS__); break;          \
    case ::kdaif::Level::avx512: ::kdaif::avx512::function(__VA_ARGS__); break;                        \
    case ::kdaif::Level::avx2: ::kdaif::avx2::function(__VA_ARGS__); break;                            \
    case ::kdaif::Level::baseline: ::kdaif::baseline::function(__VA_ARGS__); break;                    \
  }
#else
#define KDAIF_CALL_LEVEL(function, ...) ::kdaif::baseline::function(__VA_ARGS__)
#endif

// Declares `signature` once per level.
#define KDAIF_DECLARE_LEVELS(signature)   \
  namespace kdaif::baseline { signature } \
  namespace kdaif::avx2 { signature }     \
  namespace kdaif::avx512 { signature }   \
  namespace kdaif::avx512bf16 { signature }
