// The loops of kd_loss over rows [begin, end), without tensors; formulas in common/kd_loss_math.h.
#pragma once
#include <cstdint>

#include "cpu/level.h"

namespace kdaif {

enum class ElementType { float32, float64, bfloat16, float16 };

// Sums and per-row values are float64 for float64 logits and float32 otherwise ("F" below).
struct KdLossRows {
  const void* student;        // [N, V], student_stride elements from row to row
  const void* teacher;        // [N, V]; not read if alpha == 1
  const int64_t* labels;      // [N], in [0, V)
  const void* scale;          // F [N]: multiplies the row's loss and gradient
  void* loss;                 // F [N], or null if not wanted
  void* grad;                 // [N, V] contiguous, the logits' type, or null if not wanted
  int64_t student_stride, teacher_stride, classes;
  double temperature, alpha;
};

struct KdLossHvpRows {
  const void* student;  // [N, V]
  const void* tangent;  // [N, V]
  const void* scale;    // F [N]
  void* out;            // [N, V] contiguous
  int64_t student_stride, tangent_stride, classes;
  double temperature, alpha;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void kd_loss_rows(const KdLossRows& rows, ElementType type, int64_t begin, int64_t end);)
KDAIF_DECLARE_LEVELS(void kd_loss_hvp_rows(const KdLossHvpRows& rows, ElementType type, int64_t begin, int64_t end);)
