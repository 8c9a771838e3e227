"""Damping that fits the curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .system import System

AUTO_DAMPING = 0.1
"""What "auto" damping multiplies the mean eigenvalue of the curvature with."""

AUTO_PROBES = 4
"""Products that the estimate of it costs."""

LEAST_DAMPING = 1e-6
"""What "auto" damping is at least, relative to the largest eigenvalue: some ten times float32's rounding of it."""


def auto_damping(operator: Any, b: Tensor) -> float:
    """0.1 times C's mean eigenvalue, and at least 1e-6 times the largest: the solve must be possible in float32.

    A model that fits its data well has little curvature left, and that in few directions.

    Args:
        operator: C: an object with `.matmat`, or a function [K, P] -> [K, P]; its own `.mean_eigenvalue(probes=)` is
            asked for the mean if there is one. Costs 5 products.
        b: the right-hand sides [P] or [K, P]: |C b| / |b| stands for the largest eigenvalue, since b is not small along
            that direction.

    Raises:
        ValueError: the mean eigenvalue is negative.

    Source: Hutchinson 1989 for the mean.

    Example:
        >>> import torch
        >>> round(auto_damping(lambda V: 3 * V, torch.ones(4)), 4)
        0.3
    """
    system = System("auto_damping", operator, b, 0.0, None)
    if hasattr(operator, "mean_eigenvalue"):
        mean = float(operator.mean_eigenvalue(probes=AUTO_PROBES))
    else:
        mean = _mean_eigenvalue(system, AUTO_PROBES)
    first = system.rows[:1]
    largest = float(system.matmat(first).norm() / first.norm().clamp(min=torch.finfo(first.dtype).tiny))
    if mean < -LEAST_DAMPING * largest:
        raise ValueError(
            f"damping is 'auto', but the curvature's mean eigenvalue is {mean:.3g}: give damping as a number, or use a "
            "curvature that has no negative eigenvalues, such as curvature='ggn'"
        )
    return max(AUTO_DAMPING * mean, LEAST_DAMPING * largest, LEAST_DAMPING**2)


def _mean_eigenvalue(system: System, probes: int) -> float:
    """v . C v / P over random signs v, from their own generator."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (probes, system.rows.shape[1]), generator=generator).mul_(2).sub_(1).to(system.rows)
    return float((signs * system.matmat(signs)).sum()) / signs.numel()
