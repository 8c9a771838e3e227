// The loops of persample_layer_norm over blocks of features of samples, without tensors.
#pragma once
#include <cstdint>

#include "cpu/level.h"
#include "cpu/row_divergence_rows.h"  // ElementType

namespace kdaif {

// "F" is float64 for float64 inputs and float32 otherwise: the type of statistics and results.
struct PersampleLayerNorm {
  const void *inputs, *output_grads;  // [samples, positions, features], features neighbours
  int64_t input_sample, input_position, grad_sample, grad_position;  // strides
  const void *mean, *rstd;            // F [samples, positions]; mean null: 0
  void *weight_grads, *bias_grads;    // F [samples, features]
  int64_t samples, positions, features;
  int64_t blocks, block;              // a task is a block of a sample's features
};

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void persample_layer_norm_rows(const PersampleLayerNorm& norm, ElementType type, int64_t begin, int64_t end);)
