from __future__ import annotations
from typing import Any
import torch
from torch import Tensor
from .._warn import warn_user
from ..curvature import GaussNewton, Identity
from ..solvers import ConvergenceError, ConvergenceWarning, Solution, cg

SOLVERS = {"cg": cg}


def auto_damping(operator, b):
    if isinstance(operator, Identity):
        return 0.0
    mean = operator.mean_eigenvalue(probes=4)
    if isinstance(operator, GaussNewton):
        largest = float(operator.matvec(b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))
        return max(0.1 * mean, 1e-6 * largest, 1e-12)
    if mean <= 0:
        raise ValueError(f"damping is 'auto', but the Hessian's mean eigenvalue is {mean:.3g}")
    return 0.1 * mean


def solve(operator, b, method="cg", *, damping, tol, max_iter, strict=False, **options):
    s = SOLVERS[method](operator, b, damping=damping, tol=tol, max_iter=max_iter, **options)
    _warn(
        s
        if b.dim() == 1
        else s._replace(
            residual=float(s.residual.max()),
            reason=next((r for r in s.reason if r not in ("tolerance", "stopped")), "tolerance"),
        ),
        tol,
        strict,
    )
    return s


def _warn(solution, tol, strict):
    reached = f"after {solution.iterations} products at relative residual {solution.residual:.2g}"
    damping = f"the curvature plus damping {solution.damping:.3g}"
    if solution.reason == "negative curvature":
        message = f"{damping} is indefinite: conjugate gradients stopped {reached}. Use more damping, or curvature='ggn', which is positive semi-definite"
    elif solution.reason in ("singular", "diverged"):
        message = f"{damping} is too near to singular for {solution.x.dtype}: conjugate gradients stopped {reached}. Use more damping"
    elif tol is not None and not solution.converged:
        message = f"conjugate gradients stopped {reached}, above tol={tol:g}. Raise max_iter or damping (now {solution.damping:.3g}); tol=None accepts a fixed number of products"
    else:
        return
    if strict:
        raise ConvergenceError(message)
    warn_user(message, ConvergenceWarning)
