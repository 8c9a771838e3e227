"""persample_group_norm by definition: each sample's gradients of the affine parameters of a group norm.

z_icl = w_c xhat_icl + q_c with xhat_icl = (x_icl - mean_ig) rstd_ig, g the group of channel c. With b the gradient of
a sample's loss at z: dw_ic = sum_l b_icl xhat_icl, dq_ic = sum_l b_icl.
"""

from __future__ import annotations

import torch
from torch import Tensor


def persample_group_norm(inputs: Tensor, output_grads: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, L], [N, C, L], [N, groups], [N, groups] -> dw [N, C], dq [N, C], in float32 at least."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    x, b = inputs.to(wide), output_grads.to(wide)
    width = inputs.shape[1] // mean.shape[1]
    mean, rstd = (s.to(wide).repeat_interleave(width, 1).unsqueeze(2) for s in (mean, rstd))
    return (b * (x - mean) * rstd).sum(2), b.sum(2)
