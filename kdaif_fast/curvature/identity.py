"""No curvature: influence becomes a dot product of gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._model import Params, plain_model, select_parameters
from .operator import CurvatureOperator


class Identity(CurvatureOperator):
    """The identity matrix. Free, and another quantity: see docs/method.md, section 4.

    Args:
        model: any module.
        data: not looked at; here so that every operator is made alike.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.

    Example:
        >>> import torch
        >>> Identity(torch.nn.Linear(1, 2)).matvec(torch.arange(4.0))
        tensor([0., 1., 2., 3.])
    """

    def __init__(self, model: nn.Module, data: Any = None, *, params: Params | None = None, **_: Any) -> None:
        self.parameters = select_parameters(plain_model(model), params)

    def _products(self, vectors: Tensor) -> Tensor:
        return vectors.detach().clone()  # nobody expects a product to share memory with its vector
