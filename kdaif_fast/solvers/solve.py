"""The one call for all solvers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .._warn import warn_user
from .arnoldi import arnoldi
from .cg import cg
from .damping import auto_damping
from .ekfac import ekfac
from .exact import exact
from .lanczos import lanczos
from .lissa import lissa
from .minres import minres
from .nystrom import nystrom
from .right_hand_side import as_rows
from .solution import GOOD, ConvergenceError, ConvergenceWarning, Solution
from .system import check_choice, check_limits

SOLVERS: dict[str, Callable[..., Solution]] = {
    "cg": cg,
    "minres": minres,
    "lissa": lissa,
    "nystrom": nystrom,
    "lanczos": lanczos,
    "arnoldi": arnoldi,
    "ekfac": ekfac,
    "exact": exact,
}
"""All solvers, by the names that `solve` knows them by."""

COMMON = ("operator", "b", "damping", "tol", "max_iter")

ADVICE = {
    "max_iter": "Raise max_iter or damping (now {damping:.3g}); tol=None accepts a fixed number of products",
    "negative curvature": (
        "The curvature plus damping {damping:.3g} is indefinite: use more damping, a positive semi-definite curvature "
        "('ggn'), or method='minres'"
    ),
    "singular": "The curvature plus damping {damping:.3g} is too near to singular for {dtype}: use more damping",
    "diverged": "The curvature plus damping {damping:.3g} is too near to singular for {dtype}: use more damping",
    "indefinite preconditioner": "The preconditioner is not positive definite: use another one, or none",
    "rounding": "The dtype {dtype} has no more digits: use more damping (now {damping:.3g}) or float64",
    "rank": "Raise rank or damping (now {damping:.3g}); tol=None accepts what the rank gives",
    "approximation": "It is the operator's own approximation; tol=None accepts it, method='cg' goes on to tol",
}


def solve(
    operator: Any,
    b: Any,
    method: str = "cg",
    *,
    damping: float | Literal["auto"] = "auto",
    tol: float | None = 1e-3,
    max_iter: int = 500,
    strict: bool = False,
    **options: Any,
) -> Solution:
    """Solve (C + damping I) x = b for a curvature C that is given by its products.

    Args:
        operator: C: a `CurvatureOperator`, any object with `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides: a tensor [P] or [K, P], or a dictionary shaped like `operator.parameters`, each entry with
            a leading K if there are K.
        method: "cg" (positive definite), "minres" (indefinite), "lissa", "nystrom", "lanczos", "arnoldi" (cheap where
            they suit), "ekfac" (the operator's own inverse) or "exact" (the dense matrix).
        damping: added to every eigenvalue of C; "auto" is 0.1 times their mean (estimated, 5 products), and at least
            1e-6 times the largest.
        tol: the relative residual to reach; None asks for none: iterative solvers run all of max_iter.
        max_iter: the most products to spend for a right-hand side, for the solvers that count.
        strict: not to reach tol is an error.
        options: what the method takes beside: see its own docstring.

    Returns:
        The solution, in the form of b, with its residual, reason and the damping used.

    Raises:
        ConvergenceError: with strict, tol was not reached; without, only where the series of "lissa" diverges.
        TypeError, ValueError: an argument that is wrong; it is named, an entry of a dictionary by its key.

    Warns:
        ConvergenceWarning: tol was not reached, by how much, and what to do.

    Memory: that of the method, and of b in one piece.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> solution = solve(lambda V: V @ C, torch.tensor([2.0, 4.0]), damping=1.0, tol=1e-5)
        >>> [round(value, 3) for value in solution.x.tolist()], solution.converged
        ([0.667, 0.8], True)
    """
    check_choice("solve", "method", method, tuple(SOLVERS))
    if isinstance(damping, str) and damping != "auto":
        raise ValueError(f"solve: damping is {damping!r}, expected a number >= 0, or 'auto'")
    check_limits("solve", 0.0 if damping == "auto" else damping, tol, max_iter)
    solver = SOLVERS[method]
    allowed = [name for name in inspect.signature(solver).parameters if name not in COMMON]
    for option in options:
        if option not in allowed:
            choices = f"one of {', '.join(map(repr, allowed))}" if allowed else "none beside solve's own"
            raise TypeError(f"solve: method {method!r} has no option {option!r}, expected {choices}")
    rows, as_given = as_rows(b, operator)
    used = auto_damping(operator, rows) if damping == "auto" else float(damping)
    solution = solver(operator, rows, damping=used, tol=tol, max_iter=max_iter, **options)
    _report(method, solution, rows, tol, strict)
    return solution._replace(x=as_given(solution.x))


def _report(method: str, solution: Solution, rows: Tensor, tol: float | None, strict: bool) -> None:
    """Warn, or raise, where something that was asked for was not reached."""
    reasons = (solution.reason,) if isinstance(solution.reason, str) else solution.reason
    residuals = torch.as_tensor(solution.residual).reshape(-1).tolist()
    accepted = GOOD if tol is not None else (*GOOD, "max_iter", "rank", "approximation", "rounding")
    bad = [(residual, reason) for residual, reason in zip(residuals, reasons, strict=True) if reason not in accepted]
    if not bad:
        return
    residual, reason = max(bad)
    which = "" if len(reasons) == 1 else f" for {len(bad)} of {len(reasons)} right-hand sides"
    above = "" if tol is None else f", above tol={tol:g}"
    advice = ADVICE[reason].format(damping=solution.damping, dtype=rows.dtype)
    message = (
        f"{method} stopped{which} after {solution.iterations} products at relative residual {residual:.2g}{above} "
        f"({reason}). {advice}"
    )
    if strict:
        raise ConvergenceError(message)
    warn_user(message, ConvergenceWarning)
