// The loops of row_divergence over rows [begin, end), without tensors.
#pragma once
#include <cstdint>

#include "common/row_divergence_args.h"
#include "cpu/level.h"

namespace kdaif {

enum class ElementType { float32, float64, bfloat16, float16 };

// Where results go; F is the accumulation type.
struct RowResults {
  void* loss;  // F [N], or null if not wanted
  void* grad;  // [N, V] contiguous, the logits' type, or null if not wanted
};

struct RowTangents {
  const void* tangents;  // [K, N, V], the logits' type
  void* products;        // [K, N, V] contiguous
  int64_t count, stride, row_stride;
  bool gauss_newton;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void row_divergence_rows(const RowDivergence& d, ElementType type, const RowResults& results, int64_t begin, int64_t end);)
KDAIF_DECLARE_LEVELS(void row_divergence_hvp_rows(const RowDivergence& d, ElementType type, const RowTangents& tangents, int64_t begin, int64_t end);)
