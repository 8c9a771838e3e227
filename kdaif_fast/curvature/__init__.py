"""Curvature of the mean loss, as operators that multiply vectors: nothing P by P is formed unless asked for."""

from .ekfac import EKFAC
from .empirical_fisher import EmpiricalFisher
from .gauss_newton import GaussNewton
from .hessian import Hessian
from .hvp import CURVATURES, hvp, make_curvature
from .identity import Identity
from .kfac import KFAC
from .monte_carlo_fisher import MonteCarloFisher
from .operator import CurvatureOperator
from .streamed import StreamedCurvature

__all__ = [
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "CurvatureOperator",
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Identity",
    "MonteCarloFisher",
    "StreamedCurvature",
    "hvp",
    "make_curvature",
]
