"""weighted_grad by definition: the weight gradient of a linear layer for a weighted sum of the samples' losses.

sum_i w_i G_i = sum_i w_i sum_t b_it a_it^T; the letters are those of persample_dot.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_grad(inputs: Tensor, output_grads: Tensor, weights: Tensor) -> Tensor:
    """[N, T, I], [N, T, O], [N] -> [O, I], in the inputs' dtype, summed in float32 at least."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    a, b, w = (x.to(wide) for x in (inputs, output_grads, weights))
    return torch.einsum("n,nto,nti->oi", w, b, a).to(inputs.dtype)
