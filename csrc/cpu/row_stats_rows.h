// The loops of row_stats over rows [begin, end), without tensors; formulas in common/row_stats_math.h.
#pragma once
#include <cstdint>

#include "cpu/row_divergence_rows.h"  // ElementType
#include "cpu/level.h"

namespace kdaif {

// Statistics are float64 for float64 logits and float32 otherwise ("F" below).
struct RowStatsRows {
  const void* student;    // [N, V], student_stride elements from row to row
  const void* teacher;    // [N, V], or null
  const int64_t* labels;  // [N], each in [0, V) or ignore_index; or null
  void* stats;            // F [STATS_ALONE or STATS_OF_BOTH, N] contiguous
  int64_t* argmax;        // [1 or 2, N] contiguous
  int64_t student_stride, teacher_stride, rows, classes;
  int64_t first_class, class_count;  // the slice whose mass is wanted; class_count 0: none
  int64_t ignore_index;
  double temperature;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void row_stats_rows(const RowStatsRows& rows, ElementType type, int64_t begin, int64_t end);)
