"""The largest eigenvalue, by power iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .system import Products

SETTLED = 0.01  # relative change from step to step


def largest_eigenvalue(products: Products, like: Tensor, seed: int = 0, steps: int = 20) -> tuple[float, int]:
    """Estimate of the eigenvalue of largest magnitude, with its sign, and the products that it took.

    It comes from below in magnitude. Starts from random numbers of their own generator.

    Args:
        products: [1, P] -> [1, P], symmetric.
        like: a vector [1, P] of the dtype and device wanted.
        seed: of the start.
        steps: the most products to spend.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(like.shape, generator=generator).to(like)
    vector = vector / vector.norm()
    estimate = 0.0
    for step in range(1, steps + 1):
        product = products(vector)
        length = float(product.norm())
        if length == 0:
            return 0.0, step
        quotient = float((vector * product).sum())
        estimate, previous = length, estimate
        vector = product / length
        if abs(estimate - previous) <= SETTLED * estimate:
            break
    return (estimate if quotient >= 0 else -estimate), step
