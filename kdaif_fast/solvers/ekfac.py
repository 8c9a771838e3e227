"""The operator's own approximate inverse, from Kronecker factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .solution import Solution
from .system import System


def ekfac(operator: Any, b: Tensor, *, damping: float = 0.0, tol: float | None = 1e-3, max_iter: int = 500) -> Solution:
    """(C + damping I)^-1 b in closed form by `operator.solve`, or by that of `operator.ekfac()`.

    Exact for an operator of that kind; an approximation for any other curvature, as good as its residual says.

    Args:
        operator: has `.solve(b, damping)`, or `.ekfac()` that returns such an object; and products, for the residual.
        b: right-hand sides [P] or [K, P], float32 or float64.
        damping: what is added to every eigenvalue of C, >= 0.
        tol: the relative residual that counts as converged; None asks for none.
        max_iter: not used.

    Returns:
        The solution with its true residual for `operator`, which takes one product. The reason is "approximation" above
        tol; iterations is 0.

    Raises:
        TypeError: the operator has neither method.
        TypeError, ValueError: b is no vectors, or a number is no number or out of its range.

    Memory: as the operator says.

    Source: George et al. 2018 (arXiv 1806.03884); Grosse et al. 2023 (arXiv 2308.03296) for influence.
    """
    if not hasattr(operator, "solve") and not hasattr(operator, "ekfac"):
        raise TypeError(
            f"ekfac: operator is a {type(operator).__name__}, expected one with .solve(b, damping) (such as "
            "curvature='ekfac') or with .ekfac()"
        )
    system = System("ekfac", operator, b, damping, tol, max_iter)
    approximation = operator if hasattr(operator, "solve") else operator.ekfac()
    x = approximation.solve(system.rows, system.damping)
    if not isinstance(x, Tensor) or x.shape != system.rows.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"ekfac: .solve made {got} of vectors {tuple(system.rows.shape)}, expected the same shape")
    details = {"operator": type(approximation).__name__}
    return system.checked_solution(x.detach().to(system.rows.dtype), 0, "approximation", details)
