// The loops of persample_grad over samples [begin, end), without tensors.
#pragma once
#include "cpu/linear_rows.h"

namespace kdaif {

// F is the accumulation type of the layer's elements.
struct PersampleGrad {
  LinearLayer layer;
  void* grads;             // [N, O, I] of the layer's type, each sample contiguous; or null if only dots are wanted
  int64_t sample_stride;   // of grads
  const void* directions;  // F [K, O, I] contiguous
  void* dots;              // F [N, K] contiguous
  int64_t K;               // 0 if no dots are wanted
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void persample_grad_rows(const PersampleGrad& g, int64_t begin, int64_t end);)
KDAIF_DECLARE_LEVELS(void outer_product_rows(const PersampleGrad& g, int64_t begin, int64_t end);)
