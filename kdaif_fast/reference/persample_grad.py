"""persample_grad by definition: each sample's weight gradient of a linear layer, G_i = sum_t b_it a_it^T.

The letters are those of persample_dot.
"""

from __future__ import annotations

import torch
from torch import Tensor


def persample_grad(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """[N, T, I], [N, T, O] -> [N, O, I], in the inputs' dtype, summed in float32 at least."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    return torch.einsum("nto,nti->noi", output_grads.to(wide), inputs.to(wide)).to(inputs.dtype)
