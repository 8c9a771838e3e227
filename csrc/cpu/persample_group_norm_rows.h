// The loops of persample_group_norm over channels of samples, without tensors.
#pragma once
#include <cstdint>

#include "cpu/level.h"
#include "cpu/row_divergence_rows.h"  // ElementType

namespace kdaif {

// "F" is float64 for float64 inputs and float32 otherwise: the type of statistics and results.
struct PersampleGroupNorm {
  const void *inputs, *output_grads;  // [samples, channels, positions], positions neighbours
  int64_t input_sample, input_channel, grad_sample, grad_channel;  // strides
  const void *mean, *rstd;            // F [samples, groups]
  void *weight_grads, *bias_grads;    // F [samples, channels]
  int64_t samples, channels, positions, groups;
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void persample_group_norm_rows(const PersampleGroupNorm& norm, ElementType type, int64_t begin, int64_t end);)
