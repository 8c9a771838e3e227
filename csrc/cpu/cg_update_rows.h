// The loops of cg_update and cg_dots over tasks [begin, end), without tensors. A task is one chunk of one right-hand side.
#pragma once
#include <cstdint>

#include "cpu/row_divergence_rows.h"  // ElementType
#include "cpu/level.h"

namespace kdaif {

// Chunks are the same for any number of threads, and so are the sums. 8,192 elements of the vectors that an update
// touches fit into a second-level cache with room to spare, and their partial sums are few.
constexpr int64_t CG_CHUNK = 8192;

// Vectors are [K, P] of F, each row dense, `..._stride` elements from row to row.
struct CgUpdate {
  void *x, *r;
  const void *p, *Ap;
  void* best;          // or null
  const void* steps;   // F [K]
  const bool* keep;    // [K]; read if there is `best`
  double* partial;     // [K, chunks]
  int64_t x_stride, r_stride, p_stride, Ap_stride, best_stride;
  int64_t P, chunks;
  double damping;
};

struct CgDots {
  const void *p, *q;
  double* partial;  // [2, K, chunks]: p . q, p . p
  int64_t p_stride, q_stride, K, P, chunks;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void cg_update_rows(const CgUpdate& u, ElementType type, int64_t begin, int64_t end);)
KDAIF_DECLARE_LEVELS(void cg_dots_rows(const CgDots& d, ElementType type, int64_t begin, int64_t end);)
