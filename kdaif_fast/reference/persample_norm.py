"""persample_norm by definition: the squared norm of each sample's weight gradient of a linear layer.

||G_i||^2 = || sum_t b_it a_it^T ||^2 = sum_{t, t'} <a_it, a_it'> <b_it, b_it'>; the letters are those of persample_dot.
"""

from __future__ import annotations

import torch
from torch import Tensor


def persample_norm(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """[N, T, I], [N, T, O] -> [N]: ||G_i||^2 (the square, as it is summed over layers), in float32 at least."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    return torch.einsum("nto,nti->noi", output_grads.to(wide), inputs.to(wide)).square().sum((1, 2))
