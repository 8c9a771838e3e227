"""Solvers of (C + damping I) x = b that know nothing but products with C."""

from .arnoldi import arnoldi
from .cg import cg
from .damping import auto_damping
from .ekfac import ekfac
from .exact import exact
from .lanczos import lanczos
from .lissa import lissa
from .minres import minres
from .nystrom import nystrom, nystrom_preconditioner
from .solution import ConvergenceError, ConvergenceWarning, Solution
from .solve import SOLVERS, solve
from .system import check_limits

__all__ = [
    "SOLVERS",
    "ConvergenceError",
    "ConvergenceWarning",
    "Solution",
    "arnoldi",
    "auto_damping",
    "cg",
    "check_limits",
    "ekfac",
    "exact",
    "lanczos",
    "lissa",
    "minres",
    "nystrom",
    "nystrom_preconditioner",
    "solve",
]
