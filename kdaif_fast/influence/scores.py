"""Influence scores: the whole recipe, on top of a curvature operator and a solver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .._data import Batches
from .._model import Loss, Params
from .._objective import Objective
from .._warn import warn_user
from ..curvature import CurvatureOperator, GaussNewton, Identity, StreamedCurvature, make_curvature
from ..solvers import ConvergenceWarning, Solution, cg, check_limits

SOLVERS = {"cg": cg}

AUTO_DAMPING = 0.1
"""What "auto" damping multiplies the mean eigenvalue of the curvature with."""

AUTO_PROBES = 4
"""Products that the estimate of it costs."""

LEAST_DAMPING = 1e-6
"""What "auto" damping is at least, relative to the largest eigenvalue: some ten times float32's rounding of it."""


@overload
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = ...,
    params: Params | None = ...,
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
    params: Params | None = ...,
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
    params: Params | None = None,
    curvature: str = "ggn",
    solver: str = "cg",
    damping: float | Literal["auto"] = "auto",
    tol: float | None = 1e-3,
    max_iter: int = 500,
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
        loss: function (outputs, targets[, teacher_logits]) -> [N], one loss a sample, with teacher logits for samples
            that have them. Default `DistillationLoss()`: cross-entropy, or kd_loss (temperature 1, alpha 0.5) with a
            teacher; `DistillationLoss(temperature, alpha)` is the same with other settings. As `val` is what the
            student shall become good at, it usually has no teacher logits.
        params: names (of parameters or submodules), parameters or submodules to take influence over; default all that
            require grad.
        curvature: C over `batch`: "ggn" (Gauss-Newton, positive semi-definite), "hessian", or "identity" (gradient dot
            products, no solve).
        solver: "cg".
        damping: added to every eigenvalue of C; for a loss with weight decay lambda/2 |theta|^2 it is lambda. "auto" is
            0.1 times the mean eigenvalue of C, and at least 1e-6 times the largest (0 for "identity").
        tol: the relative residual at which the solve stops; None spends exactly max_iter products, without a warning.
        max_iter: the most curvature products to spend.
        return_solution: also return the solve's `Solution`: x = (C + damping I)^-1 grad L_val, flat [P], which is the
            `direction` of weighted_step; residual, iterations, damping used.

    Returns:
        phi, [N], float32 (float64 for float64 models), in nats; with return_solution, (phi, Solution).

    Raises:
        TypeError, ValueError: arguments that do not fit together; a model that mixes samples or draws at random
            (BatchNorm or Dropout in training mode); a loss that is not per sample; a sample whose loss is not finite.
            Each names the argument and what was expected.
        RuntimeError: a layer or a loss whose backward pass is not differentiable itself (looked for at the first call
            with a model in float32 or float64; activation checkpointing must be off).

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
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(map(repr, SOLVERS))}")
    check_limits("influence", 0.0 if damping == "auto" else damping, tol, max_iter)
    if isinstance(params, Iterator):
        params = list(params)  # it would be empty the second time
    with torch.inference_mode(False):
        data = Batches(batch, "batch")
        operator = make_curvature(curvature, model, data, loss=loss, params=params)
        if isinstance(operator, StreamedCurvature):
            (train,) = operator.objectives()
        else:
            train = _finite_objective(model, batch, loss, params, "batch")
        validation = _finite_objective(model, val, loss, params, "val")
        solution = _solve(operator, validation.gradient() / validation.samples, solver, damping, tol, max_iter)
        phi = -train.dots(solution.x[None])[:, 0]
    return (phi, solution) if return_solution else phi


def _finite_objective(model: nn.Module, batch: Any, loss: Loss | None, params: Params | None, name: str) -> Objective:
    objective = Objective(model, batch, loss, params, name)
    objective.require_finite()
    return objective


def _solve(
    operator: CurvatureOperator,
    validation_grad: Tensor,
    solver: str,
    damping: float | Literal["auto"],
    tol: float | None,
    max_iter: int,
) -> Solution:
    """(C + damping I)^-1 grad L_val."""
    lam = _auto_damping(operator, validation_grad) if damping == "auto" else float(damping)
    if isinstance(operator, Identity):
        return Solution(validation_grad / (1 + lam), 0.0, 0, True, lam, "tolerance")
    solution = SOLVERS[solver](operator, validation_grad, damping=lam, tol=tol, max_iter=max_iter)
    _warn_if_not_converged(operator, solution, tol)
    return solution


def _auto_damping(operator: CurvatureOperator, b: Tensor) -> float:
    if isinstance(operator, Identity):
        return 0.0
    mean = operator.mean_eigenvalue(probes=AUTO_PROBES)
    if isinstance(operator, GaussNewton):
        # A model that fits its batch well has little curvature left, and that in few directions; the solve must still
        # be possible in float32. |C b| / |b| is near the largest eigenvalue: b is not small along that direction.
        largest = float(operator.matvec(b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))
        return max(AUTO_DAMPING * mean, LEAST_DAMPING * largest, LEAST_DAMPING**2)
    if mean <= 0:
        raise ValueError(
            f"damping is 'auto', but the Hessian's mean eigenvalue is {mean:.3g}: give damping as a number, or use "
            "curvature='ggn', which has no negative eigenvalues"
        )
    return AUTO_DAMPING * mean


def _warn_if_not_converged(operator: CurvatureOperator, solution: Solution, tol: float | None) -> None:
    reached = f"after {solution.iterations} products at relative residual {solution.residual:.2g}"
    damping = f"the curvature plus damping {solution.damping:.3g}"
    if solution.reason == "negative curvature" and not isinstance(operator, GaussNewton):
        message = (
            f"{damping} is indefinite: conjugate gradients stopped {reached}. Use more damping, or curvature='ggn', "
            "which is positive semi-definite"
        )
    elif solution.reason in ("negative curvature", "singular", "diverged"):
        message = (
            f"{damping} is too near to singular for {solution.x.dtype}: conjugate gradients stopped {reached}. Use "
            "more damping"
        )
    elif tol is not None and not solution.converged:
        message = (
            f"conjugate gradients stopped {reached}, above tol={tol:g}. Raise max_iter or damping (now "
            f"{solution.damping:.3g}); tol=None accepts a fixed number of products"
        )
    else:
        return
    warn_user(message, ConvergenceWarning)
