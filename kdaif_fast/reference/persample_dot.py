"""persample_dot by definition: each sample's weight gradient of a linear layer, contracted with directions.

N samples of T positions; a linear layer z = a W^T maps I features to O. With b the gradient of a sample's loss at z,
the gradient of sample i in W is G_i = sum_t b_it a_it^T, and <G_i, V> = sum_t b_it^T V a_it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def persample_dot(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> Tensor:
    """[N, T, I], [N, T, O], [K, O, I] -> [N, K]: <G_i, V_k>, in float32 at least."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    a, b, v = (x.to(wide) for x in (inputs, output_grads, directions))
    return torch.einsum("nti,koi,nto->nk", a, v, b)
