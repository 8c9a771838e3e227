// A linear layer's inputs and output gradients without tensors, as persample_dot, persample_norm, persample_grad and
// weighted_grad read them. The letters are those of kdaif_fast/reference/persample_dot.py.
#pragma once
#include <cstdint>

#include "cpu/level.h"
#include "cpu/row_divergence_rows.h"  // ElementType

namespace kdaif {

// [N, T, width]; the elements of a position are neighbours, samples and positions lie any distance apart.
struct Positions {
  const void* data;
  int64_t sample_stride, position_stride, width;

  template <class T> const T* at(int64_t sample, int64_t position) const {
    return static_cast<const T*>(data) + sample * sample_stride + position * position_stride;
  }
};

struct LinearLayer {
  Positions inputs, output_grads;
  int64_t N, T;
  ElementType type;  // of both

  int64_t rows() const { return N * T; }
  template <class E> const E* input(int64_t row) const { return inputs.at<E>(row / T, row % T); }
  template <class E> const E* output_grad(int64_t row) const { return output_grads.at<E>(row / T, row % T); }
};

}  // namespace kdaif
