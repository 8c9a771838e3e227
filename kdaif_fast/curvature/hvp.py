"""Curvature products in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._model import Loss, Params
from .ekfac import EKFAC
from .empirical_fisher import EmpiricalFisher
from .gauss_newton import GaussNewton
from .hessian import Hessian
from .identity import Identity
from .kfac import KFAC
from .monte_carlo_fisher import MonteCarloFisher
from .operator import CurvatureOperator, Direction

CURVATURES: dict[str, Callable[..., CurvatureOperator]] = {
    "ggn": GaussNewton,
    "hessian": Hessian,
    "empirical_fisher": EmpiricalFisher,
    "monte_carlo_fisher": MonteCarloFisher,
    "kfac": KFAC,
    "ekfac": EKFAC,
    "identity": Identity,
}
"""The operators by the names that calls take."""


def make_curvature(curvature: str, model: nn.Module, data: Any, **options: Any) -> CurvatureOperator:
    """The operator of that name over the data; ValueError if there is none."""
    if not isinstance(curvature, str) or curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}, expected one of {', '.join(map(repr, CURVATURES))}")
    return CURVATURES[curvature](model, data, **options)


def hvp(
    model: nn.Module,
    batch: Any,
    directions: Direction,
    *,
    curvature: str = "hessian",
    loss: Loss | None = None,
    params: Params | None = None,
    memory: int | None = None,
) -> Direction:
    """C v: the curvature of the mean loss, times one vector or several at once.

    For several products with the same curvature make the operator once, `curvature.Hessian(model, batch)`: what this
    call spends before the first product (a forward and a backward pass) is then spent once.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout).
        batch: (inputs, targets[, teacher_logits]), a mapping with those keys, or a loader of batches.
        directions: flat [P] or [K, P], in the order of model.named_parameters(); or a dictionary shaped like the
            parameters, or one of tensors with a leading K.
        curvature: "hessian", "ggn", "empirical_fisher", "monte_carlo_fisher", "kfac", "ekfac" or "identity".
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        memory: bytes that products with many vectors may use beyond the linearisation; default 1 GiB.

    Returns:
        The products, in the form that the directions have.

    Raises:
        ValueError: directions that do not fit the parameters, naming the entry; a model that mixes samples.

    Memory: the graph of one forward and one backward pass, and K vectors.

    Source: Pearlmutter 1994; Schraudolph 2002. Scaled dot product attention runs on torch's math backend here, since
        the fused ones have no second derivatives.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> hvp(model, batch, torch.eye(9)).shape
        torch.Size([9, 9])
    """
    operator = make_curvature(curvature, model, batch, loss=loss, params=params, memory=memory)
    if _stacked(directions, operator):
        return operator.matmat(directions)
    return operator.matvec(directions)


def _stacked(directions: Any, operator: CurvatureOperator) -> bool:
    if isinstance(directions, Tensor):
        return directions.dim() == 2
    if not hasattr(directions, "items"):
        return False
    shapes = {name: p.dim() for name, p in operator.parameters.items()}
    return all(getattr(entry, "dim", int)() > shapes.get(name, 0) for name, entry in directions.items())
