"""persample_inner by definition: each sample's inner products of several tensors with one."""

from __future__ import annotations

import torch
from torch import Tensor


def persample_inner(left: Tensor, right: Tensor) -> Tensor:
    """[N, K, *S], [N, *S] -> sum over S of left * right: [N, K], float32 at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    products = left.to(wide) * right.to(wide).unsqueeze(1)
    return products.reshape(*left.shape[:2], left.shape[2:].numel()).sum(2)
