"""Solvers of (C + damping I) x = b that know nothing but products with C."""

from .cg import cg
from .solution import ConvergenceError, ConvergenceWarning, Solution
from .system import check_limits

__all__ = ["ConvergenceError", "ConvergenceWarning", "Solution", "cg", "check_limits"]
