"""The Arnoldi process: a low-rank inverse from a Krylov space."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .krylov import low_rank_solution
from .solution import Solution
from .system import System


def arnoldi(
    operator: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 500,
    rank: int = 50,
    steps: int | None = None,
    start: str = "random",
    outside: str | None = None,
    seed: int = 0,
) -> Solution:
    """(C + damping I)^-1 b on the span of C's `rank` largest Ritz vectors in a Krylov space.

    All of C in the space is kept and made symmetric, so that products with noise in them do less harm than in
    `lanczos`; how far they are from symmetric is reported.

    Args:
        operator: C, symmetric: an object with `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides [P] or [K, P], float32 or float64.
        damping: what is added to every eigenvalue of C, >= 0.
        tol: the relative residual that counts as converged.
        max_iter: the most products to spend: bounds the steps.
        rank: Ritz vectors to keep, those of the largest |eigenvalues|.
        steps: the dimension of the Krylov space; by default `rank` from b, twice that from a random start, where the
            last Ritz vectors have not settled.
        start: "b", every right-hand side has a space of its own, which suits it; or "random", one space serves all.
        outside: what the inverse is outside of the span: "zero", or "damping" for 1 / damping; by default the
            latter where there is damping.
        seed: of the random start.

    Returns:
        The solution with its true residual, which takes one more product. The reason is "rank" above tol, or "singular"
        where b has parts along eigenvalues of C + damping I that are 0, which are left out. details: "rank" (kept),
        "eigenvalues" (Ritz values of C, falling; [K, steps] for K right-hand sides from b), "asymmetry" (of C in the
        space, relative), "outside".

    Raises:
        TypeError, ValueError: b is no vectors, a number is no number or out of its range, or no such choice.

    Memory: steps P numbers (K steps P from K right-hand sides), and what the operator needs.

    Source: Arnoldi 1951; for influence: Schioppa, Zablotskaia, Vilar and Sokolov 2022 (arXiv 2112.03052).

    Example:
        >>> import torch
        >>> C = torch.diag(torch.tensor([2.0, 4.0, 0.0]))
        >>> solution = arnoldi(lambda V: V @ C, torch.tensor([2.0, 4.0, 1.0]), outside="zero", rank=2, start="random")
        >>> [round(value, 4) + 0.0 for value in solution.x.tolist()], solution.reason
        ([1.0, 1.0, 0.0], 'rank')
    """
    system = System("arnoldi", operator, b, damping, tol, max_iter)
    return low_rank_solution(
        system,
        max_iter,
        rank=rank,
        steps=steps,
        start=start,
        outside=outside,
        seed=seed,
        tridiagonal=False,
    )
