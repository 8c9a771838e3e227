from __future__ import annotations
from typing import Any
import torch
from torch import Tensor
from .._warn import warn_user
from ..curvature import GaussNewton, Identity
from ..solvers import ConvergenceWarning, Solution, cg

SOLVERS = {"cg": cg}


class ConvergenceError(RuntimeError): ...


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
    if b.dim() == 1:
        s = SOLVERS[method](
            lambda v: operator.matmat(v[None])[0], b, damping=damping, tol=tol, max_iter=max_iter, **options
        )
        _warn(s, tol, strict)
        return s
    parts = [
        solve(operator, r, method, damping=damping, tol=tol, max_iter=max_iter, strict=strict, **options) for r in b
    ]
    return Solution(
        torch.stack([p.x for p in parts]),
        torch.tensor([p.residual for p in parts], dtype=torch.float64),
        max(p.iterations for p in parts),
        all(p.converged for p in parts),
        damping,
        tuple(p.reason for p in parts),
    )


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
