// Which kernel of row_divergence a call gets, and its launch geometry. Plain functions of plain numbers.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
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
  unsigned shared = 0;        // bytes of dynamic shared memory
  unsigned shared_limit = 0;  // to allow the kernel: the same in all calls, since threads may set it at the same time
};

// Of the GPU: how many multiprocessors, and bytes of shared memory that a block can have.
struct Machine {
  int64_t multiprocessors, shared;
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
  if (d.ce == 0 && (d.teacher == nullptr || d.kd == 0)) return false;
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

// What is read of a row: the student's logits, and the teacher's.
inline int streams_of(const RowDivergence& d) { return d.teacher == nullptr || d.kd == 0 ? 1 : 2; }

enum class FastPath { warp, block, wide, split, ring };

// What KDAIF_ROW_PLAN asks for, to measure plans against each other: "path", "path:threads" or "path:threads:blocks",
// blocks being those of the ring that share a multiprocessor. A path that a call cannot take is not taken.
struct PlanWish {
  bool any = false;
  FastPath path = FastPath::warp;
  unsigned threads = 0;
  int64_t blocks = 1;
};

inline PlanWish plan_wish(const char* text) {
  constexpr const char* names[] = {"warp", "block", "wide", "split", "ring"};
  PlanWish w;
  if (text == nullptr) return w;
  const size_t length = std::strcspn(text, ":");
  for (int i = 0; i < 5; ++i)
    if (std::strlen(names[i]) == length && std::strncmp(text, names[i], length) == 0) w.any = true, w.path = FastPath(i);
  if (text[length] == 0) return w;
  char* end = nullptr;
  w.threads = static_cast<unsigned>(std::strtoul(text + length + 1, &end, 10));
  if (w.threads < 64 || w.threads > FAST_THREADS || (w.threads & (w.threads - 1)) != 0) w.threads = 0;
  if (*end == ':') w.blocks = std::strtol(end + 1, nullptr, 10);
  if (w.blocks < 1) w.blocks = 1;
  return w;
}

// How rows pass through shared memory; row_divergence_ring.cuh says what it is for.
struct RingShape {
  int slots, streams;       // a slot has `packets` packets of each stream and thread
  int chunks, kept, again;  // of a row; in the ring for the second look; read again for it
};

constexpr int KEPT_PACKETS = 2;                    // of each array in a thread's registers: more would spill
constexpr int RING_PACKETS = 2;                    // of a stream in a slot, and of products 1
constexpr int IN_FLIGHT = 4, IN_FLIGHT_HVP = 8;    // groups of copies not waited for: fewer than slots
constexpr int64_t LONGEST_RING_ROW = 1 << 30;      // elements are counted in 32 bits there
constexpr int AHEAD = 2;      // slots for the next chunks at least
constexpr int64_t STATIC_SHARED = 2048;  // what the kernels have besides: for reductions

inline unsigned shared_limit(const Machine& m) { return static_cast<unsigned>(m.shared - STATIC_SHARED); }

struct RingKind {
  int width, streams, packets, in_flight;
  bool two_looks;
};

// With no second look, nothing is kept. slots is 0 where shared memory is too small.
inline RingShape ring_shape(int64_t V, const RingKind& kind, unsigned threads, int64_t blocks, const Machine& m) {
  constexpr int64_t reserved = 1024;  // of each block, by CUDA
  const int64_t bytes = (m.shared + reserved) / blocks - reserved - STATIC_SHARED;
  const int64_t loads = int64_t(threads) * kind.packets, chunk = loads * kind.width;
  const int64_t slots = V <= LONGEST_RING_ROW ? bytes / (kind.streams * loads * 16) : 0;
  if (slots <= kind.in_flight) return {};
  RingShape r{static_cast<int>(slots), kind.streams, static_cast<int>((V + chunk - 1) / chunk), 0, 0};
  if (kind.two_looks) r.kept = r.chunks < r.slots - AHEAD ? r.chunks : r.slots - AHEAD;
  if (kind.two_looks) r.again = r.chunks - r.kept;
  return r;
}

// A ring with the most threads that leave enough slots, in whatever number was asked for.
struct RingPlan {
  RingShape shape;
  unsigned threads, bytes;
};
inline RingPlan ring_plan(int64_t V, const RingKind& kind, const Machine& m, const PlanWish& wish) {
  RingPlan p{{}, wish.threads > 0 ? wish.threads : FAST_THREADS, 0};
  for (; p.threads >= 64; p.threads /= 2) {
    p.shape = ring_shape(V, kind, p.threads, wish.blocks, m);
    if (p.shape.slots == 0) continue;
    p.bytes = static_cast<unsigned>(p.shape.slots * kind.streams * kind.packets) * p.threads * 16;
    return p;
  }
  return p;
}

struct FastPlan {
  FastPath path;
  int width, packets;    // elements a load, loads a thread
  Launch launch;
  int64_t chunk, chunks;  // elements of a row for each block, and how many such; for `split`
  int64_t workspace;      // elements of the accumulation type
  RingShape ring;
};

inline bool plan_split(FastPlan& p, int64_t N, int64_t V, const Machine& m) {
  const int64_t wanted = 2 * m.multiprocessors / N, possible = V / SHORTEST_CHUNK;
  const int64_t chunks = at_most(wanted < possible ? wanted : possible, FAST_THREADS);  // a thread reads one's sums
  if (chunks < 2) return false;
  p.path = FastPath::split;
  p.chunk = ((V + chunks - 1) / chunks + 15) / 16 * 16;
  p.chunks = (V + p.chunk - 1) / p.chunk;
  p.launch = {static_cast<unsigned>(p.chunks), static_cast<unsigned>(N), FAST_THREADS};
  p.workspace = N * p.chunks * 7;  // 6 sums and a value each
  return true;
}

inline bool plan_ring(FastPlan& p, int64_t N, int64_t V, int streams, bool has_grad, const Machine& m,
                      const PlanWish& wish) {
  if (p.width == 1) return false;
  const RingPlan ring = ring_plan(V, {p.width, streams, RING_PACKETS, IN_FLIGHT, has_grad}, m, wish);
  if (ring.shape.slots == 0) return false;
  p.path = FastPath::ring, p.ring = ring.shape;
  p.launch = {at_most(N, m.multiprocessors * wish.blocks), 1, ring.threads, ring.bytes, shared_limit(m)};
  return true;
}

inline void plan_wide(FastPlan& p, int64_t N, int64_t V, const PlanWish& wish) {
  p.path = FastPath::wide;
  p.launch = {at_most(N, MOST_BLOCKS), 1, wish.threads > 0 ? wish.threads : 64};
  while (wish.threads == 0 && p.launch.threads < FAST_THREADS && V > p.launch.threads * p.width * 8)
    p.launch.threads *= 2;
}

// Threads for a row in a block's registers; 0 if it does not fit.
inline unsigned block_threads(int64_t V, int width) {
  unsigned threads = 64;
  while (threads < FAST_THREADS && V > int64_t(threads) * width * KEPT_PACKETS) threads *= 2;
  return width > 1 && V <= int64_t(threads) * width * KEPT_PACKETS ? threads : 0;
}

inline FastPlan fast_plan(int64_t N, int64_t V, int streams, bool has_grad, int64_t element_size, bool vectorised,
                          const Machine& m, const PlanWish& wish = {}) {
  const int width = vectorised ? static_cast<int>(16 / element_size) : 1;
  FastPlan p{FastPath::warp, width, vectorised ? 1 : 8, {1, 1, 32 * WARPS_IN_BLOCK}, V, 1, 0, {}};
  if (vectorised && V > 32 * width) p.packets = KEPT_PACKETS;
  const bool any = !wish.any;
  if (V <= 32 * width * p.packets && (any || wish.path == FastPath::warp)) {
    p.launch.blocks = at_most((N + WARPS_IN_BLOCK - 1) / WARPS_IN_BLOCK, MOST_BLOCKS);
    return p;
  }
  p.packets = 0;
  if (block_threads(V, width) > 0 && (any || wish.path == FastPath::block)) {
    p.path = FastPath::block, p.packets = KEPT_PACKETS;
    p.launch = {at_most(N, MOST_BLOCKS), 1, block_threads(V, width)};
    return p;
  }
  if ((any || wish.path == FastPath::split) && plan_split(p, N, V, m)) return p;
  if ((any || wish.path == FastPath::ring) && plan_ring(p, N, V, streams, has_grad, m, wish)) return p;
  plan_wide(p, N, V, wish);
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
  FastPath path;  // warp, block or ring
  int width;
  Launch launch;
  int64_t items;  // rows times groups of tangents
  RingShape ring;
};

inline FastHvpPlan fast_hvp_plan(int64_t N, int64_t V, int64_t K, int64_t element_size, bool vectorised,
                                 const Machine& m, const PlanWish& wish = {}) {
  const int width = vectorised ? static_cast<int>(16 / element_size) : 1;
  const int streams = 1 + static_cast<int>(K < TANGENTS ? K : TANGENTS);
  FastHvpPlan p{FastPath::warp, width, {1, 1, 32 * WARPS_IN_BLOCK}, N * ((K + TANGENTS - 1) / TANGENTS), {}};
  const bool any = !wish.any;
  if (V <= 32 * width * 4 && (any || wish.path == FastPath::warp)) {
    p.launch.blocks = at_most((p.items + WARPS_IN_BLOCK - 1) / WARPS_IN_BLOCK, MOST_BLOCKS);
    return p;
  }
  const RingPlan ring = ring_plan(V, {width, streams, 1, IN_FLIGHT_HVP, true}, m, wish);
  const bool is_long = V * element_size >= (16 << 10);  // shorter ones: the caches hold several
  if (vectorised && ring.shape.slots > 0 && (any ? is_long : wish.path == FastPath::ring)) {
    p.path = FastPath::ring, p.ring = ring.shape;
    p.launch = {at_most(p.items, m.multiprocessors * wish.blocks), 1, ring.threads, ring.bytes, shared_limit(m)};
    return p;
  }
  p.path = FastPath::block;
  p.launch.blocks = at_most(p.items, MOST_BLOCKS);
  while (p.launch.threads < FAST_THREADS && p.launch.threads * width * 4 < V) p.launch.threads *= 2;
  return p;
}

}  // namespace kdaif
