"""persample_layer_norm in Triton: sums over the positions of each sample, for each feature. See affine_sums.py."""

from __future__ import annotations

from torch import Tensor

from .affine_sums import affine_sums


def persample_layer_norm(
    inputs: Tensor, output_grads: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """[N, T, D], [N, T, D], [N, T] or None, [N, T] -> dw, dc [N, D], float32. float32, bfloat16, float16."""
    return affine_sums(inputs, output_grads, mean, rstd, 2, None)
