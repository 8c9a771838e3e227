"""What a solver returns, and what it says when it could not do what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


class ConvergenceWarning(UserWarning):
    """A solve stopped before it reached its tolerance; the message says how far it got."""


class ConvergenceError(RuntimeError):
    """A solve did not reach its tolerance and was told that it must, or can only give a wrong answer."""


class Solution(NamedTuple):
    """The solution of (C + damping I) x = b, and how good it is."""

    x: Any
    """The solution in the form of b: a tensor [P] or [K, P]; from `solve` with a dictionary, a dictionary. If not
    converged, the last iterate, or the best one if the solve went wrong."""
    residual: float | Tensor
    """|b - (C + damping I) x| / |b|: a number, or float64 [K] on the CPU; 0 where b is 0."""
    iterations: int
    """Products with C that every right-hand side took, the most of all; a product that only checks is not counted."""
    converged: bool
    """Whether all residuals are within the tolerance, or the caller's own test ended the solve."""
    damping: float
    """The damping that was used."""
    reason: str | tuple[str, ...]
    """Why it stopped, for each right-hand side if there are K: "tolerance", "stopped" (by the caller's test),
    "max_iter", "negative curvature", "singular", "diverged", "indefinite preconditioner", "rounding" (the dtype has no
    more digits), "rank" (of a low-rank inverse) or "approximation" (of the operator's own inverse)."""
    details: Mapping[str, Any] = MappingProxyType({})
    """What else the solver has to say; its docstring has the names."""


GOOD = ("tolerance", "stopped")
"""The reasons of a solve that converged."""
