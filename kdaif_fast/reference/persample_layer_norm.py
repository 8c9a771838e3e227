"""persample_layer_norm by definition: each sample's gradients of the affine parameters of a layer or RMS norm.

z_itd = w_d xhat_itd + c_d with xhat_it = (x_it - mean_it) rstd_it over the D features of one position. With b the
gradient of a sample's loss at z: dw_i = sum_t b_it * xhat_it, dc_i = sum_t b_it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def persample_layer_norm(
    inputs: Tensor, output_grads: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """[N, T, D], [N, T, D], [N, T] (None: an RMS norm, mean 0), [N, T] -> dw [N, D], dc [N, D], float32 at least."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    x, b = inputs.to(wide), output_grads.to(wide)
    centred = x if mean is None else x - mean.to(wide).unsqueeze(2)
    return (b * centred * rstd.to(wide).unsqueeze(2)).sum(1), b.sum(1)
