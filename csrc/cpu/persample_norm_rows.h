// The loops of persample_norm over samples [begin, end), without tensors.
#pragma once
#include "cpu/linear_rows.h"

namespace kdaif {

// How a sample's squared norm is formed. The first is for T = 1 only.
enum class NormBy { lengths, gram, gradient };

struct PersampleNorm {
  LinearLayer layer;
  void* norms;  // F [N] contiguous
  NormBy by;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void persample_norm_rows(const PersampleNorm& x, int64_t begin, int64_t end);)
