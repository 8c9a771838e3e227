"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from .solution import Solution

# A GPU is asked for the residual only now and then, since each look waits for it.
LOOKS_EVERY = {"cpu": 1}
LOOKS_EVERY_ELSEWHERE = 10

# Residuals of conjugate gradients go up and down, but not by this much unless rounding has taken over.
DIVERGED = 1e4


def cg(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 200,
    stop: Callable[[Tensor], bool] | None = None,
    stop_every: int = 5,
) -> Solution:
    """Solve (C + damping I) x = b for a symmetric positive definite C + damping I.

    Args:
        matvec: the product with C, [P] -> [P].
        b: right-hand side [P].
        damping: what is added to every eigenvalue of C, >= 0.
        tol: stop when the residual is below tol * |b|; None runs all of max_iter (no look at the values, no wait).
        max_iter: the most products to spend.

    Returns:
        The solution, with its residual. A direction along which C + damping I is not positive ends the solve, with the
        reason "negative curvature" (or "singular", if it is zero to rounding), and so does a residual that grows
        without end ("diverged", as rounding makes it for matrices that are nearly singular). Then x is the iterate of
        least residual; the right-hand side itself, if the very first direction was of that kind.

    Raises:
        TypeError, ValueError: b is no vector, or a number is no number or out of its range.

    Memory: 5 vectors [P] and what matvec needs.

    Source: Hestenes and Stiefel 1952; stopping at negative curvature as in Steihaug 1983.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> solution = cg(lambda v: C @ v, torch.tensor([2.0, 4.0]), tol=1e-6)
        >>> [round(value, 4) for value in solution.x.tolist()], solution.converged
        ([1.0, 1.0], True)
    """
    if b.dim() != 1:
        raise ValueError(f"cg: b has shape {tuple(b.shape)}, expected a vector [P]")
    check_limits("cg", damping, tol, max_iter)
    if tol is not None and not b.any():
        return Solution(torch.zeros_like(b), 0.0, 0, True, damping, "tolerance")
    tiny, epsilon = torch.finfo(b.dtype).tiny, torch.finfo(b.dtype).eps
    unit = b.abs().max().clamp(min=tiny)  # so that squares neither under- nor overflow
    x, r = torch.zeros_like(b), b / unit
    p, rr = r.clone(), r @ r
    bb = rr.clone()
    best, best_rr = x.clone(), bb.clone()
    lowest, highest = torch.full_like(rr, math.inf), torch.zeros_like(rr)  # of p . A p / p . p so far
    stopped, diverged = torch.zeros_like(rr, dtype=torch.bool), torch.zeros_like(rr, dtype=torch.bool)
    looks_every = LOOKS_EVERY.get(b.device.type, LOOKS_EVERY_ELSEWHERE)
    iterations, reason = 0, "max_iter"
    while iterations < max_iter:
        Ap = matvec(p)
        if damping:
            Ap = Ap.add(p, alpha=damping)
        pAp, active = p @ Ap, rr > epsilon**2 * bb  # below that r is rounding, and p says nothing of the matrix
        quotient = torch.where(active, pAp / (p @ p).clamp(min=tiny), math.inf)
        lowest, highest = (
            torch.minimum(lowest, quotient),
            torch.where(active, torch.maximum(highest, quotient), highest),
        )
        # From here on every step is 0, so no look at the values is needed for stopping.
        stopped |= ~(quotient > 0)
        if iterations == 0:
            best = torch.where(stopped, r, best)
        step = torch.where(stopped | ~active, 0, rr / torch.where(active, pAp, 1))
        x.addcmul_(p, step)
        r.addcmul_(Ap, step, value=-1)
        rr, previous = r @ r, rr
        better = rr < best_rr
        best, best_rr = torch.where(better, x, best), torch.where(better, rr, best_rr)
        diverged |= ~(rr <= DIVERGED**2 * bb)
        stopped |= diverged
        p.mul_(torch.where(active, rr / previous.clamp(min=tiny), 0)).add_(r)
        iterations += 1
        if stop is not None and iterations % stop_every == 0 and stop(x[None]):
            reason = "stopped"
            break
        if tol is not None and (iterations % looks_every == 0 or iterations == max_iter):
            if bool(stopped):
                break
            if float(rr) <= tol**2 * float(bb):
                reason = "tolerance"
                break
    if bool(stopped):
        zero = 100 * epsilon * float(highest)
        reason = "negative curvature" if float(lowest) < -zero else "diverged" if bool(diverged) else "singular"
    if bool(stopped) or float(rr) > float(bb):
        x, rr = best, best_rr
    residual = math.sqrt(float(rr) / float(bb)) if float(bb) else 0.0
    return Solution(x * unit, residual, iterations, reason in ("tolerance", "stopped"), damping, reason)


def check_limits(name: str, damping: float, tol: float | None, max_iter: int) -> None:
    """Raise unless these are what they should be; `name` is the caller's."""
    if isinstance(damping, bool) or not isinstance(damping, Real):
        raise TypeError(f"{name}: damping is {damping!r}, expected a number >= 0")
    if not 0 <= damping < math.inf:
        raise ValueError(f"{name}: damping is {damping!r}, expected a finite number >= 0")
    if tol is not None and not isinstance(tol, Real):
        raise TypeError(f"{name}: tol is {tol!r}, expected a number between 0 and 1, or None")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"{name}: tol is {tol!r}, expected a number between 0 and 1, or None")
    if isinstance(max_iter, bool) or not isinstance(max_iter, Integral):
        raise TypeError(f"{name}: max_iter is {max_iter!r}, expected an int >= 1")
    if max_iter < 1:
        raise ValueError(f"{name}: max_iter is {max_iter!r}, expected at least 1")
