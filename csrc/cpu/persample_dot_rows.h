// The loops of persample_dot over panels of 16 positions, without tensors.
#pragma once
#include "cpu/linear_rows.h"

namespace kdaif {

struct PersampleDot {
  LinearLayer layer;
  const void* directions;  // F [K, O, I] contiguous; F is the accumulation type of the layer's elements
  void* dots;              // F [N T, K] contiguous, zeros before: of each position
  int64_t K;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void persample_dot_rows(const PersampleDot& d, int64_t begin, int64_t end);)
