"""What a solver returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvergenceWarning(UserWarning):
    """A solve stopped before it reached its tolerance; the message says how far it got."""


class Solution(NamedTuple):
    """The solution of (C + damping I) x = b, and how good it is."""

    x: Tensor
    """The solution [P]; if not converged, the last iterate, or the best one if the solve went wrong."""
    residual: float
    """|b - (C + damping I) x| / |b|, as the solver's recurrence knows it."""
    iterations: int
    """Products with C spent."""
    converged: bool
    """Whether the residual is within the tolerance."""
    damping: float
    """The damping that was used."""
    reason: str
    """Why it stopped: "tolerance", "max_iter", "negative curvature", "singular" or "diverged"."""
