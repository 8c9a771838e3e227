"""The solve of the recipe: K right-hand sides, as many at once as the memory allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .._progress import bar
from ..curvature import CurvatureOperator, Identity
from ..solvers import SOLVERS, Solution, auto_damping, check_limits, solve
from .preconditioning import choose_preconditioner
from .rank import LOOKS_EVERY, RANK_TOLERANCE, RankSettled

Tolerance = float | Literal["rank"] | None

VECTORS_OF_A_SOLVE = 8
"""Vectors [P] that an iterative solver has for each right-hand side."""

MEMORY = 1 << 30
"""Bytes for them, unless `memory` says else."""

ROUGH = 3e-2
"""The relative residual from which on a solve counts as a rough one."""

ITERATIVE = ("cg", "minres", "lissa")
"""Solvers whose cost is by right-hand side; the others form something first that all should share."""


def check_settings(solver: str, damping: Any, tol: Any, max_iter: Any, memory: Any = None) -> None:
    """Raise TypeError or ValueError, naming the argument, before anything is computed."""
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(map(repr, SOLVERS))}")
    if tol == "rank" and solver != "cg":
        raise ValueError(f"tol is 'rank', which needs solver='cg', but solver is {solver!r}")
    check_limits("influence", 0.0 if damping == "auto" else damping, None if tol == "rank" else tol, max_iter)
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise ValueError(f"memory is {memory!r}, expected a positive number of bytes")


def solve_queries(
    operator: CurvatureOperator,
    b: Tensor,
    solver: str,
    *,
    damping: float | Literal["auto"],
    tol: Tolerance,
    max_iter: int,
    strict: bool,
    memory: int | None,
    options: Mapping[str, Any],
    settled: Callable[[bool], RankSettled],
    progress: bool | None,
) -> Solution:
    """(C + damping I)^-1 b for every row of b [K, P]; x takes the place of b. With K = 1, x is [P].

    settled: makes what tells whether the ranking has, for tol="rank"; told whether there is a preconditioner.
    """
    if isinstance(operator, Identity):
        return _undirected(b, 0.0 if damping == "auto" else float(damping))
    # Of the mean: the same damping whatever is asked about, and however it is split.
    lam = auto_damping(operator, b.mean(0)) if damping == "auto" else float(damping)
    rows = b.split(_at_once(b, solver, memory))
    given = dict(options)
    if solver == "cg":
        is_rough = isinstance(tol, float) and tol >= ROUGH
        given["preconditioner"] = choose_preconditioner(given.get("preconditioner", "auto"), operator, is_rough, memory)
    with _Watched(operator, progress) as watched:
        parts = []
        for some in rows:
            extra = dict(given)
            if tol == "rank":
                extra |= {"stop": settled(given["preconditioner"] is not None), "stop_every": LOOKS_EVERY}
            part = solve(
                watched,
                some[0] if len(b) == 1 else some,
                solver,
                damping=lam,
                tol=RANK_TOLERANCE if tol == "rank" else tol,
                max_iter=max_iter,
                strict=strict,
                **extra,
            )
            if len(rows) > 1:
                some.copy_(part.x)
                part = part._replace(x=some)
            parts.append(part)
    return parts[0] if len(parts) == 1 else _joined(parts, b)


def _at_once(b: Tensor, solver: str, memory: int | None) -> int:
    """How many right-hand sides are solved together: about as many each time."""
    K = len(b)
    if solver not in ITERATIVE:
        return K
    most = max(1, (memory or MEMORY) // max(1, VECTORS_OF_A_SOLVE * b.shape[1] * b.element_size()))
    return -(-K // -(-K // most))


def _undirected(b: Tensor, damping: float) -> Solution:
    """The solution where C is the identity."""
    K, x = len(b), b / (1 + damping)
    if K == 1:
        return Solution(x[0], 0.0, 0, True, damping, "tolerance")
    return Solution(x, torch.zeros(K, dtype=torch.float64), 0, True, damping, ("tolerance",) * K)


def _joined(parts: list[Solution], x: Tensor) -> Solution:
    return parts[0]._replace(
        x=x,
        residual=torch.cat([torch.as_tensor(part.residual) for part in parts]),
        iterations=max(part.iterations for part in parts),
        converged=all(part.converged for part in parts),
        reason=tuple(reason for part in parts for reason in part.reason),
    )


class _Watched:
    """The operator, with a progress bar that counts products."""

    def __init__(self, operator: CurvatureOperator, progress: bool | None) -> None:
        self._operator = operator
        self._bar = bar(progress, desc="solve", unit="product")

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def matvec(self, vector: Tensor) -> Tensor:
        """C v."""
        return self.matmat(vector[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """C V."""
        self._bar.update()
        return self._operator.matmat(vectors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)
