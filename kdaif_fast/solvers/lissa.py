"""The Neumann series, with stochastic products where the operator has them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .largest_eigenvalue import largest_eigenvalue
from .looks import looks_every
from .solution import ConvergenceError, Solution
from .system import System, check_count, products_of

# Power iteration comes from below, and products of single batches reach further than their mean. The series converges
# for any scale above half of the largest eigenvalue, the slower the larger it is.
SCALE_MARGIN = 1.1
DOUBLINGS = 6  # of a scale that was too small

# What a contraction may seem to grow by, for rounding.
ROUNDING = 1e-3

# What a residual may rise by after it fell: products in half precision are that noisy.
GROWN = 4.0


def lissa(
    operator: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 500,
    scale: float | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Solution:
    """Solve (C + damping I) x = b by x <- x + (b - (C + damping I) x) / scale.

    Where the operator offers `.stochastic(seed)`, an operator of one batch (curvature over a loader does), every step
    takes the product of another batch, and the results of several repeats are averaged: a step costs a batch and not
    the data set, but the error does not fall below the batches' noise. Otherwise products are exact, and `cg` needs far
    fewer of them.

    Args:
        operator: C, positive semi-definite: an object with `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides [P] or [K, P], float32 or float64.
        damping: what is added to every eigenvalue of C, >= 0.
        tol: the relative residual to reach. Exact products stop there; stochastic ones always take max_iter steps. None
            takes max_iter steps.
        max_iter: steps (of each repeat).
        scale: what steps are divided by, at least the largest eigenvalue of C + damping I for steady convergence; by
            default 1.1 times an estimate of it (power iteration, some 10 products).
        repeats: runs to average, with other batches each; only for stochastic products.
        seed: of the batches and of the power iteration.

    Returns:
        The solution with its true residual, which takes one more product. details: "scale", "stochastic", "repeats",
        "attempts" (1, and one for every doubling of a scale that diverged), "spread" (|x_1 - x_2| / |x| between
        repeats, as a standard deviation; 0 for one). iterations counts the products of the estimate and of all runs.

    Raises:
        ConvergenceError: the series diverges: C + damping I is indefinite (no scale helps: more damping, a
            positive semi-definite curvature or minres do), or the scale is still too small after 6 doublings. A
            diverged series is never returned.
        TypeError, ValueError: b is no vectors, or a number is no number or out of its range.

    Memory: 3 tensors like b, and what the operator needs.

    Source: Agarwal, Bullins and Hazan 2017 (arXiv 1602.03943); for influence: Koh and Liang 2017, section 3.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> solution = lissa(lambda V: V @ C, torch.tensor([2.0, 4.0]), tol=1e-6)
        >>> [round(value, 4) for value in solution.x.tolist()], solution.converged
        ([1.0, 1.0], True)
    """
    system = System("lissa", operator, b, damping, tol, max_iter)
    check_count("lissa", "repeats", repeats)
    is_stochastic = hasattr(operator, "stochastic")
    iterations = 0
    if scale is None:
        scale, iterations = _scale(system, seed)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"lissa: scale is {scale!r}, expected a positive finite number, or None")
    runs = [_Run(system, seed + repeat * max_iter) for repeat in range(repeats if is_stochastic else 1)]
    for attempt in range(1, DOUBLINGS + 2):
        iterates = []
        for run in runs:
            x = run.stochastic(scale, max_iter) if is_stochastic else run.exact(scale, max_iter)
            iterations += run.spent
            if x is None:
                break
            iterates.append(x)
        if len(iterates) == len(runs):
            break
        _require_definite(system, run.direction, scale)
        if attempt > DOUBLINGS:
            raise ConvergenceError(
                f"lissa: the series diverges, even with scale {scale:.3g} after {DOUBLINGS} doublings. Give a larger "
                "scale, or use method='cg'"
            )
        scale *= 2
    stacked = torch.stack(iterates)
    x = stacked.mean(0)
    spread = float((stacked - x).norm() / (math.sqrt(max(len(runs) - 1, 1)) * x.norm()).clamp(min=1e-300))
    details = {
        "scale": scale,
        "stochastic": is_stochastic,
        "repeats": len(runs),
        "attempts": attempt,
        "spread": spread,
    }
    return system.checked_solution(x, iterations, "max_iter", details)


def _scale(system: System, seed: int) -> tuple[float, int]:
    estimate, products = largest_eigenvalue(system.matmat, system.rows[:1], seed)
    if estimate + system.damping < 0:
        _refuse_indefinite(system, estimate + system.damping)
    return (SCALE_MARGIN * (abs(estimate) + system.damping) or 1.0), products


def _require_definite(system: System, direction: Tensor, scale: float) -> None:
    """Raise if there is negative curvature along a direction in which the series grew."""
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
    lowest = float((direction * system.damped(direction)).sum(1).min())
    if lowest < -1e-3 * torch.finfo(direction.dtype).eps ** 0.5 * scale:
        _refuse_indefinite(system, lowest)


def _refuse_indefinite(system: System, curvature: float) -> None:
    raise ConvergenceError(
        f"lissa: the curvature plus damping {system.damping:.3g} is indefinite (curvature {curvature:.3g} along a "
        "direction met), where the Neumann series diverges with any scale. Use more damping, a positive semi-definite "
        "curvature ('ggn'), or method='minres'"
    )


class _Run:
    """One run of the series; None where it diverged, and then `direction` is where to."""

    def __init__(self, system: System, seed: int) -> None:
        self.system, self.seed, self.spent = system, seed, 0
        self.direction = system.rows

    def exact(self, scale: float, steps: int) -> Tensor | None:
        """With C + damping I = A, r = (1 - A / scale)^j b: of a series that converges it never grows.

        It is a sum of parts that each fall or rise without end, so one that rises again after it fell diverges.
        """
        system, look = self.system, looks_every(self.system.rows.device)
        x, least = system.rows / scale, system.squares
        epsilon = torch.finfo(x.dtype).eps
        self.spent = 0
        for step in range(1, steps + 1):
            r = system.rows - system.damped(x)
            self.spent = step
            if step % look == 0 or step == steps:
                errors = r.double().square().sum(1).cpu()
                noise = (100 * epsilon * step) ** 2 * system.squares
                most = torch.minimum((1 + ROUNDING) * system.squares, (GROWN**2 * least).maximum(noise))
                if not bool((errors <= most).all()):
                    self.direction = r if bool(r.isfinite().all()) else self.direction
                    return None
                least = torch.minimum(least, errors)
                if system.tol is not None and bool((errors <= system.tol**2 * system.squares).all()):
                    return x
            if step < steps:
                x = x.add_(r, alpha=1 / scale)
        return x

    def stochastic(self, scale: float, steps: int) -> Tensor | None:
        """|x_j| <= j |b| / scale while no step's matrix 1 - A / scale is longer than 1; beyond that one was."""
        system, look = self.system, looks_every(self.system.rows.device)
        x = system.rows / scale
        self.spent = 0
        for step in range(1, steps + 1):
            batch = products_of("lissa", system.operator.stochastic(self.seed + step))
            product = batch(x).detach().to(x.dtype)
            self.spent = step
            x = x.mul_(1 - system.damping / scale).add_(system.rows - product, alpha=1 / scale)
            if step % (10 * look) == 0 or step == steps:
                longest = (step + 1) / scale * system.squares.sqrt()
                if not bool((x.double().norm(dim=1).cpu() <= (1 + ROUNDING) * longest).all()):
                    self.direction = x if bool(x.isfinite().all()) else self.direction
                    return None
        return x
