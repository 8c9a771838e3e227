"""Solvers of (C + damping I) x = b that know nothing but products with C."""

from .cg import cg
from .solution import ConvergenceWarning, Solution

__all__ = ["ConvergenceWarning", "Solution", "cg"]
