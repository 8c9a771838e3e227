"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .solution import Solution

# A GPU is asked for the residual only now and then, since each look waits for it.
LOOKS_EVERY = {"cpu": 1}
LOOKS_EVERY_ELSEWHERE = 10


def cg(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 200,
) -> Solution:
    """Solve (C + damping I) x = b for a symmetric positive definite C + damping I.

    Args:
        matvec: the product with C, [P] -> [P].
        b: right-hand side [P].
        damping: what is added to every eigenvalue of C, >= 0.
        tol: stop when the residual is below tol * |b|; None runs all of max_iter (no look at the values, no wait).
        max_iter: the most products to spend.

    Returns:
        The solution, with its residual. A direction of negative curvature ends the solve with what was reached so far
        (the right-hand side itself, if it is the first one) and reason "negative curvature".

    Raises:
        ValueError: b is no vector, or a number is out of its range.

    Memory: 4 vectors [P] and what matvec needs.

    Source: Hestenes and Stiefel 1952; stopping at negative curvature as in Steihaug 1983.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> solution = cg(lambda v: C @ v, torch.tensor([2.0, 4.0]), tol=1e-6)
        >>> [round(value, 4) for value in solution.x.tolist()], solution.converged
        ([1.0, 1.0], True)
    """
    _check_arguments(b, damping, tol, max_iter)
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    bb = rr.clone()
    looks_every = LOOKS_EVERY.get(b.device.type, LOOKS_EVERY_ELSEWHERE)
    tiny = torch.finfo(b.dtype).tiny
    iterations, reason = 0, "max_iter"
    indefinite = torch.zeros_like(rr, dtype=torch.bool)
    if tol is not None and float(bb) == 0:
        return Solution(x, 0.0, 0, True, damping, "tolerance")
    while iterations < max_iter:
        Ap = matvec(p)
        if damping:
            Ap = Ap.add(p, alpha=damping)
        curvature = p @ Ap
        # From the first direction of negative curvature on, every step is 0: no look at the value is needed for that.
        indefinite |= curvature < 0
        step = torch.where(indefinite, 0, rr / curvature.clamp(min=tiny))
        if iterations == 0:
            x = torch.where(indefinite, b, x)
        x.addcmul_(p, step)
        r.addcmul_(Ap, step, value=-1)
        rr, previous = r @ r, rr
        p.mul_(rr / previous.clamp(min=tiny)).add_(r)
        iterations += 1
        if tol is not None and (iterations % looks_every == 0 or iterations == max_iter):
            if bool(indefinite):
                reason = "negative curvature"
                break
            if float(rr) <= tol**2 * float(bb):
                reason = "tolerance"
                break
    return _report(x, rr, bb, iterations, damping, reason, bool(indefinite))


def _report(
    x: Tensor, rr: Tensor, bb: Tensor, iterations: int, damping: float, reason: str, indefinite: bool
) -> Solution:
    residual = math.sqrt(float(rr) / float(bb)) if float(bb) else 0.0
    reason = "negative curvature" if indefinite else reason
    return Solution(x, residual, iterations, reason == "tolerance", damping, reason)


def _check_arguments(b: Tensor, damping: float, tol: float | None, max_iter: int) -> None:
    if b.dim() != 1:
        raise ValueError(f"cg: b has shape {tuple(b.shape)}, expected a vector [P]")
    if not 0 <= damping < math.inf:
        raise ValueError(f"cg: damping is {damping!r}, expected a finite number >= 0")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"cg: tol is {tol!r}, expected a number between 0 and 1, or None")
    if max_iter < 1:
        raise ValueError(f"cg: max_iter is {max_iter!r}, expected at least 1")
