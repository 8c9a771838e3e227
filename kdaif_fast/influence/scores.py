"""Influence scores: the whole recipe, on top of a curvature operator and a solver."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, overload

from torch import Tensor, nn

from .._model import Loss
from .._objective import Objective
from ..curvature import CurvatureOperator, GaussNewton, Hessian, Identity
from ..solvers import ConvergenceWarning, Solution, cg

CURVATURES: dict[str, type[CurvatureOperator]] = {"ggn": GaussNewton, "hessian": Hessian, "identity": Identity}
SOLVERS = {"cg": cg}

AUTO_DAMPING = 0.1
"""What "auto" damping multiplies the mean eigenvalue of the curvature with."""


@overload
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = ...,
    params: Iterable[str | Tensor] | None = ...,
    curvature: str = ...,
    solver: str = ...,
    damping: float | Literal["auto"] = ...,
    tol: float | None = ...,
    max_iter: int = ...,
    return_solution: Literal[False] = ...,
) -> Tensor: ...
@overload
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = ...,
    params: Iterable[str | Tensor] | None = ...,
    curvature: str = ...,
    solver: str = ...,
    damping: float | Literal["auto"] = ...,
    tol: float | None = ...,
    max_iter: int = ...,
    return_solution: Literal[True],
) -> tuple[Tensor, Solution]: ...
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = None,
    params: Iterable[str | Tensor] | None = None,
    curvature: str = "ggn",
    solver: str = "cg",
    damping: float | Literal["auto"] = "auto",
    tol: float | None = 1e-3,
    max_iter: int = 200,
    return_solution: bool = False,
) -> Tensor | tuple[Tensor, Solution]:
    """Influence phi [N] of every sample of `batch` on the mean loss of `val`; phi > 0 means harmful.

    phi_i = -grad L_val^T (C + damping I)^-1 grad l_i is n times the rate at which the validation loss changes with
    the weight of sample i in the mean training loss: giving sample i the weight 1 + eps changes L_val by eps phi_i / n,
    leaving it out by -phi_i / n, to first order.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged.
        batch: the training samples: (inputs, targets), (inputs, targets, teacher_logits), or a mapping with those
            keys. `inputs` is one tensor, a tuple of positional or a mapping of keyword arguments of the model.
        val: the validation samples, in the same form.
        loss: function (outputs, targets[, teacher_logits]) -> [N], one loss a sample. Default cross-entropy, or
            kd_loss (temperature 1, alpha 0.5) for samples that have teacher logits.
        params: names (of parameters or submodules) or parameters to take influence over; default all that require grad.
        curvature: C over `batch`: "ggn" (Gauss-Newton, positive semi-definite), "hessian", or "identity" (gradient dot
            products, no solve).
        solver: "cg".
        damping: added to every eigenvalue of C; for a loss with weight decay lambda/2 |theta|^2 it is lambda. "auto" is
            0.1 times the mean eigenvalue of C (0 for "identity").
        tol: the relative residual at which the solve stops; None spends exactly max_iter products, without a warning.
        max_iter: the most curvature products to spend.
        return_solution: also return the solve's `Solution`: residual, iterations, damping used.

    Returns:
        phi, [N], float32 (float64 for float64 models), in nats; with return_solution, (phi, Solution).

    Raises:
        TypeError, ValueError: arguments that do not fit together; a BatchNorm or Dropout in training mode; a loss that
            is not per sample. Each names the argument and what was expected.

    Warns:
        ConvergenceWarning: the solve did not reach `tol`, and by how much.

    Memory: the graph of one forward and one backward pass over `batch`, a few vectors [P]. Nothing [N, P].

    Source: Koh and Liang 2017 (arXiv 1703.04730), equation 2; sign and scale of docs/method.md, equation 2.

    Example:
        >>> import torch, kdaif_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = torch.randn(20, 4), torch.randint(0, 3, (20,))
        >>> val = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> phi = kdaif_fast.influence_scores(model, batch, val, damping=0.1)
        >>> phi.shape, bool((phi > 0).any())
        (torch.Size([20]), True)
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}, expected one of {', '.join(map(repr, CURVATURES))}")
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(map(repr, SOLVERS))}")
    train = Objective(model, batch, loss, params, "batch")
    validation_grad = Objective(model, val, loss, params, "val").gradient()
    operator = CURVATURES[curvature](None, train)
    lam = _damping(operator, damping)
    if isinstance(operator, Identity):
        solution = Solution(validation_grad / (1 + lam), 0.0, 0, True, lam, "tolerance")
    else:
        solution = SOLVERS[solver](operator.matvec, validation_grad, damping=lam, tol=tol, max_iter=max_iter)
        _warn_if_not_converged(solution, tol)
    phi = -train.dots(solution.x)
    return (phi, solution) if return_solution else phi


def _damping(operator: CurvatureOperator, damping: float | str) -> float:
    if damping == "auto":
        if isinstance(operator, Identity):
            return 0.0
        mean = operator.mean_eigenvalue()
        if not 0 < mean < math.inf:
            raise ValueError(
                f"damping is 'auto', but the curvature's mean eigenvalue is {mean:.3g}: give damping as a number, or "
                "use curvature='ggn', which has no negative eigenvalues"
            )
        return AUTO_DAMPING * mean
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise ValueError(f"damping is {damping!r}, expected a finite number >= 0 or 'auto'")
    return float(damping)


def _warn_if_not_converged(solution: Solution, tol: float | None) -> None:
    if solution.reason == "negative curvature":
        warnings.warn(
            f"the curvature plus damping {solution.damping:.3g} is indefinite: conjugate gradients stopped after "
            f"{solution.iterations} products at relative residual {solution.residual:.2g}. Use more damping, or "
            "curvature='ggn', which is positive semi-definite",
            ConvergenceWarning,
            stacklevel=3,
        )
    elif tol is not None and not solution.converged:
        warnings.warn(
            f"conjugate gradients reached relative residual {solution.residual:.2g} after {solution.iterations} "
            f"products, not tol={tol:g}. Raise max_iter or damping (now {solution.damping:.3g}), or pass tol=None to "
            "accept a fixed number of products",
            ConvergenceWarning,
            stacklevel=3,
        )
