"""Solvers of (C + damping I) x = b that know nothing but products with C."""

from .cg import cg, check_limits
from .solution import ConvergenceWarning, Solution

__all__ = ["ConvergenceWarning", "Solution", "cg", "check_limits"]
