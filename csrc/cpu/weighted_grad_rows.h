// The loops of weighted_grad over panels of 16 input features, without tensors.
#pragma once
#include "cpu/linear_rows.h"

namespace kdaif {

struct WeightedGrad {
  LinearLayer layer;
  const void* weights;  // F [N]; F is the accumulation type of the layer's elements
  int64_t weight_stride;
  void* sums;  // F [O, I] contiguous; what is there before does not matter
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void weighted_grad_rows(const WeightedGrad& w, int64_t begin, int64_t end);)
