"""Conjugate gradients, for K right-hand sides at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.cg_update import CG_DOTS, CG_UPDATE
from .cg_columns import Columns
from .looks import FEW_LEFT, looks_every
from .solution import Solution
from .system import System, check_count, relative

# What the recurrence takes for the residual and the true one part by about this times sqrt(iterations) |C| |x| and the
# dtype's rounding. Where that is more than the residual, and than half of what is asked for, the true one counts.
DOUBTFUL = 0.3

# A true residual that is above tol by no more than this comes below it when the recurrence starts from it again.
NEAR = 2.0
RESTARTS = 2

WENT_WRONG = ("negative curvature", "singular", "diverged", "indefinite preconditioner")


def cg(
    operator: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 500,
    preconditioner: Any = None,
    stop: Callable[[Tensor], bool] | None = None,
    stop_every: int = 5,
) -> Solution:
    """Solve (C + damping I) x = b for a symmetric positive definite C + damping I.

    Every right-hand side takes its own steps; one product an iteration serves those that are not done.

    Args:
        operator: C: an object with `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides [P] or [K, P], float32 or float64.
        damping: what is added to every eigenvalue of C, >= 0.
        tol: a right-hand side is done when its residual is below tol * |b|; None runs all of max_iter (no look at the
            values, no wait).
        max_iter: the most products to spend.
        preconditioner: M^-1 for a symmetric positive definite M near C + damping I: a function [K, P] -> [K, P], or an
            object with `.solve(b, damping)`.
        stop: the caller's own test of the iterates [K, P]; True ends the solve, which then counts as converged.
        stop_every: iterations between calls of it.

    Returns:
        The solution, with the residual that the recurrence has, or the true one (for one more product) where rounding
        may have parted the two. If that is a little above tol, the recurrence goes on from it; else the reason is
        "rounding". A direction along which C + damping I is not positive ends a right-hand side with the reason
        "negative curvature" (or "singular", if it is zero to rounding), and so does a residual that grows without end
        ("diverged", as rounding makes it for matrices that are nearly singular). Then x is the iterate of least
        residual; the first direction itself (b, or M^-1 b), if that was already of this
        kind. details: "iterations" of each right-hand side; "lowest_curvature" and "highest_curvature", the extreme
        p . (C + damping I) p / p . p met.

    Raises:
        TypeError, ValueError: b is no vectors, or a number is no number or out of its range.

    Memory: 6 tensors like b, one more with a preconditioner, and what the operator needs.

    Source: Hestenes and Stiefel 1952; stopping at negative curvature as in Steihaug 1983.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> solution = cg(lambda V: V @ C, torch.tensor([2.0, 4.0]), tol=1e-6)
        >>> [round(value, 4) for value in solution.x.tolist()], solution.converged
        ([1.0, 1.0], True)
    """
    system = System("cg", operator, b, damping, tol, max_iter)
    check_count("cg", "stop_every", stop_every)
    precondition = _preconditioner(preconditioner, system.damping)
    columns = Columns.start(system.rows, precondition, tol)
    look = looks_every(b.device)
    done: list[Columns] = []
    iterations, is_stopped, restarts = 0, False, 0
    true: Tensor | None = None
    products = max_iter if tol is None or bool(system.squares.any()) else 0
    while iterations < products:
        _iterate(system, columns, precondition, iterations == 0)
        iterations += 1
        if stop is not None and iterations % stop_every == 0 and stop(columns.joined(done).x * system.units):
            is_stopped = True
            break
        if tol is None or iterations % look:
            continue
        running = columns.running_count()
        if running == 0:
            columns, done = columns.joined(done), []
            true, goes_on = _start_again(system, columns, precondition, restarts < RESTARTS)
            if not goes_on:
                break
            restarts += 1
        elif running <= FEW_LEFT * len(columns.x):
            is_running = columns.is_running()
            done.append(columns.at(~is_running))
            columns = columns.at(is_running)
    return _finish(system, columns.joined(done), iterations, is_stopped, true)


def _iterate(system: System, columns: Columns, precondition: Callable[[Tensor], Tensor] | None, is_first: bool) -> None:
    Ap = system.matmat(columns.p)
    if is_first:
        columns.rate_first_direction(Ap, system.damping)
    steps = columns.steps(CG_DOTS(columns.p, Ap), system.damping)
    rr = CG_UPDATE(columns.x, columns.r, columns.p, Ap, steps, system.damping, columns.best, columns.keep())
    if precondition is None:
        torch.addcmul(columns.r, columns.p, columns.conjugate(rr), out=columns.p)
    else:
        z = precondition(columns.r)
        torch.addcmul(z, columns.p, columns.conjugate(rr, CG_DOTS(columns.r, z)[0]), out=columns.p)


def _doubtful(system: System, columns: Columns) -> Tensor:
    """Where rounding may have parted the recurrence's residual from the true one, bool [K] on the CPU."""
    size, epsilon = columns.x.norm(dim=1, dtype=torch.float64).cpu(), torch.finfo(columns.x.dtype).eps
    rr, highest, iterations = (
        torch.tensor(columns.numbers(name), dtype=torch.float64) for name in ("rr", "highest", "iterations")
    )
    apart = DOUBTFUL * iterations.sqrt() * epsilon * highest.max().clamp(min=0) * size
    return apart > torch.maximum(rr.sqrt(), (system.tol or 0) / 2 * system.squares.sqrt())


def _start_again(
    system: System, columns: Columns, precondition: Callable[[Tensor], Tensor] | None, allowed: bool
) -> tuple[Tensor | None, bool]:
    """True residuals [K], if they had to be looked at, and whether columns for which it is worth it go on from them."""
    assert system.tol is not None
    goals = system.tol * system.squares.sqrt()
    is_done = torch.tensor(columns.numbers("rr"), dtype=torch.float64).sqrt() <= goals
    is_checked = is_done & _doubtful(system, columns)
    if not bool(is_checked.any()):
        return None, False
    r = system.rows - system.damped(columns.x)
    sizes = r.norm(dim=1, dtype=torch.float64).cpu()
    which = (is_checked & (sizes > goals) & (sizes <= NEAR * goals)).nonzero()[:, 0].to(r.device)
    if not allowed or not len(which):
        return relative(sizes.square(), system.squares), False
    columns.restart(which, r[which], precondition)
    return None, True


def _preconditioner(preconditioner: Any, damping: float) -> Callable[[Tensor], Tensor] | None:
    if preconditioner is None:
        return None
    if hasattr(preconditioner, "solve"):
        function: Callable[[Tensor], Tensor] = lambda rows: preconditioner.solve(rows, damping)  # noqa: E731
    elif callable(preconditioner):
        function = preconditioner
    else:
        kind = type(preconditioner).__name__
        raise TypeError(
            f"cg: preconditioner is a {kind}, expected a function [K, P] -> [K, P] or an object with .solve"
        )

    def checked(rows: Tensor) -> Tensor:
        result = function(rows)
        if not isinstance(result, Tensor) or result.shape != rows.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"cg: preconditioner made {got} of vectors {tuple(rows.shape)}, expected the same shape")
        return result.detach().to(rows.dtype)

    return checked


def _finish(system: System, columns: Columns, iterations: int, is_stopped: bool, true: Tensor | None) -> Solution:
    names = ("rr", "best_rr", "first_rr", "lowest", "highest", "last", "iterations", "running", "better", "indefinite")
    state = [dict(zip(names, values, strict=True)) for values in zip(*(columns.numbers(n) for n in names), strict=True)]
    squares, epsilon = system.squares.tolist(), torch.finfo(columns.x.dtype).eps
    reasons = [
        _reason(column, square, system.tol, epsilon, is_stopped) for column, square in zip(state, squares, strict=True)
    ]
    for k, (column, reason) in enumerate(zip(state, reasons, strict=True)):
        if reason in ("negative curvature", "singular") and column["iterations"] == 1:
            columns.x[k], column["rr"] = columns.p[k], column["first_rr"]
        elif reason in WENT_WRONG or (reason != "stopped" and not column["rr"] <= squares[k]):
            if not column["better"]:
                columns.x[k] = columns.best[k]
            column["rr"] = column["best_rr"]
    residuals = relative(torch.tensor([column["rr"] for column in state], dtype=torch.float64), system.squares)
    is_doubtful = _doubtful(system, columns)
    if bool(is_doubtful.any()):
        if true is None or any(reason != "tolerance" for reason in reasons):
            true = system.residuals(columns.x)
        residuals = torch.where(is_doubtful, true, residuals)
        reasons = [
            "rounding" if reason == "tolerance" and system.tol and not residual <= system.tol else reason
            for reason, residual in zip(reasons, residuals.tolist(), strict=True)
        ]
    extremes = {
        f"{name}_curvature": system.per_column(torch.tensor([column[name] for column in state], dtype=torch.float64))
        for name in ("lowest", "highest")
    }
    counts = system.per_column(torch.tensor([column["iterations"] for column in state]))
    return system.solution(columns.x, residuals, iterations, reasons, {"iterations": counts, **extremes})


def _reason(column: dict[str, Any], square: float, tol: float | None, epsilon: float, is_stopped: bool) -> str:
    """Why a column is where it is."""
    rr, quotient = column["rr"], column["last"]
    if tol is not None and rr <= tol**2 * square:
        return "tolerance"
    if column["running"]:
        return "stopped" if is_stopped else "max_iter"
    if column["indefinite"]:
        return "indefinite preconditioner"
    if quotient <= 0:
        zero = 100 * epsilon * max(column["highest"], 0)
        return "negative curvature" if column["lowest"] < -zero else "singular"
    if not rr <= epsilon**2 * square * (1 + epsilon) or math.isnan(quotient):
        return "diverged"
    # Nothing is left but rounding.
    return "max_iter" if tol is None else "rounding"
