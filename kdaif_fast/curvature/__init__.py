"""Curvature of the mean loss, as operators that multiply vectors: nothing P by P is ever formed."""

from .gauss_newton import GaussNewton
from .hessian import Hessian
from .identity import Identity
from .operator import CurvatureOperator

__all__ = ["CurvatureOperator", "GaussNewton", "Hessian", "Identity"]
