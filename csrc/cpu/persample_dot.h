// persample_dot as persample_grad uses it.
#pragma once
#include "cpu/linear_tensors.h"

namespace kdaif {

// Whether a sample's gradient, formed in registers and contracted there, costs less than K products b^T V a per position.
bool dots_by_gradients(int64_t T, int64_t K);

// [N, K] in the accumulation type; directions [K, O, I].
Tensor persample_dot(const HeldLinearLayer& held, const Tensor& directions);

}  // namespace kdaif
