// Which kernel of row_divergence a call gets, and its launch geometry. Plain functions of plain numbers.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/row_divergence_args.h"

namespace kdaif {

constexpr int GENERAL_THREADS = 256;
constexpr int FAST_THREADS = 512;
constexpr int WARPS_IN_BLOCK = 4;            // of the kernel that gives each warp its own row
constexpr int TANGENTS = 4;                  // that share a look at a class
constexpr int64_t SHORTEST_CHUNK = 8192;     // elements, where several blocks share a row
constexpr int64_t MOST_BLOCKS = 0x7fffffff;  // rows beyond so many are taken in turns

enum Element : int { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

struct Tangents {
  const void* u;  // T [K, N, V], strides as below
  void* out;      // T [K, N, V] contiguous
  int64_t K, tangent_stride, row_stride;
};

struct Launch {
  unsigned blocks, blocks_y, threads;
};

inline unsigned at_most(int64_t count, int64_t limit) { return static_cast<unsigned>(count < limit ? count : limit); }

// Calls body with the kind as a constant.
template <class Body, int kind = 0>
void for_kind(int wanted, Body body) {
  if (wanted == kind) body(std::integral_constant<int, kind>());
  else if constexpr (kind < SWAPPED_CROSS_ENTROPY) for_kind<Body, kind + 1>(wanted, body);
}

// Some elements for each thread, in whole warps.
inline Launch general_launch(int64_t N, int64_t V) {
  unsigned threads = 32;
  while (threads < GENERAL_THREADS && threads * 4 < V) threads *= 2;
  return {at_most(N, MOST_BLOCKS), 1, threads};
}

// No option that the fast kernels do not know.
inline bool is_common(const RowDivergence& d) {
  if (d.rows != nullptr || d.soft_labels != nullptr || d.class_weight != nullptr || d.smoothing != 0) return false;
  if (d.teacher == nullptr || (d.kd == 0 && d.other == 0)) return true;
  const bool forward = (d.kind == KL && d.other == 0) || d.kind == CROSS_ENTROPY;
  return forward && d.form == LOGITS && !d.mixes && !d.exclude_label && d.interpolation == 1 && d.mask == nullptr &&
         d.class_count == d.V;
}

// Whether rows can be read and written 16 bytes at a time. Outputs have the row stride V.
inline bool is_vectorisable(const RowDivergence& d, const void* grad, int64_t element_size) {
  auto fits = [&](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && (d.N == 1 || stride * element_size % 16 == 0);
  };
  return d.V * element_size % 16 == 0 && fits(d.student, d.student_stride) && fits(grad, d.V) &&
         fits(d.teacher, d.teacher == nullptr ? 0 : d.teacher_stride);
}

enum class FastPath { warp, block, wide, split };

struct FastPlan {
  FastPath path;
  int width, packets;    // elements a load, loads a thread
  Launch launch;
  int64_t chunk, chunks;  // elements of a row for each block, and how many such; for `split`
  int64_t workspace;      // elements of the accumulation type
};

inline FastPlan fast_plan(int64_t N, int64_t V, int64_t element_size, bool vectorised, int64_t multiprocessors) {
  const int width = vectorised ? static_cast<int>(16 / element_size) : 1;
  FastPlan p{FastPath::warp, width, vectorised ? 1 : 8, {1, 1, 32 * WARPS_IN_BLOCK}, V, 1, 0};
  if (vectorised && V > 32 * width) p.packets = 4;
  if (V <= 32 * width * p.packets) {
    p.launch.blocks = at_most((N + WARPS_IN_BLOCK - 1) / WARPS_IN_BLOCK, MOST_BLOCKS);
    return p;
  }
  p.path = FastPath::block;
  p.launch = {at_most(N, MOST_BLOCKS), 1, 64};
  while (p.launch.threads < FAST_THREADS && V > p.launch.threads * width * p.packets) p.launch.threads *= 2;
  if (V > p.launch.threads * width * p.packets) p.packets = 8;
  if (V <= p.launch.threads * width * p.packets) return p;
  p.path = FastPath::wide;
  p.packets = 0;
  const int64_t wanted = 2 * multiprocessors / N, possible = V / SHORTEST_CHUNK;
  const int64_t chunks = at_most(wanted < possible ? wanted : possible, FAST_THREADS);  // a thread reads one's sums
  if (chunks < 2) return p;
  p.path = FastPath::split;
  p.chunk = ((V + chunks - 1) / chunks + 15) / 16 * 16;
  p.chunks = (V + p.chunk - 1) / p.chunk;
  p.launch = {static_cast<unsigned>(p.chunks), static_cast<unsigned>(N), FAST_THREADS};
  p.workspace = N * p.chunks * 6;  // 5 sums and a value each
  return p;
}

// A product with K tangents, where a group of them is the work of one block, or of one warp where the row is short.
inline bool is_vectorisable(const RowDivergence& d, const Tangents& t, int64_t element_size) {
  RowDivergence student = d;
  student.teacher = nullptr;
  const bool aligned = reinterpret_cast<uintptr_t>(t.u) % 16 == 0 && t.tangent_stride * element_size % 16 == 0 &&
                       t.row_stride * element_size % 16 == 0;
  return aligned && is_vectorisable(student, t.out, element_size);
}

struct FastHvpPlan {
  bool warps;
  int width;
  Launch launch;
};

inline FastHvpPlan fast_hvp_plan(int64_t N, int64_t V, int64_t K, int64_t element_size, bool vectorised,
                                 int64_t multiprocessors) {
  const int width = vectorised ? static_cast<int>(16 / element_size) : 1;
  FastHvpPlan p{V <= 32 * width * 4, width, {1, 1, 32 * WARPS_IN_BLOCK}};
  const int64_t teams = p.warps ? (N + WARPS_IN_BLOCK - 1) / WARPS_IN_BLOCK : N, groups = (K + TANGENTS - 1) / TANGENTS;
  const int64_t idle = 4 * multiprocessors / teams;  // few rows: several blocks share a row's tangents
  p.launch.blocks = at_most(teams, MOST_BLOCKS);
  p.launch.blocks_y = at_most(groups, idle < 1 ? 1 : idle);
  while (!p.warps && p.launch.threads < FAST_THREADS && p.launch.threads * width * 2 < V) p.launch.threads *= 2;
  return p;
}

}  // namespace kdaif
