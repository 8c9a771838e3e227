"""No curvature: influence becomes a dot product of gradients."""

from torch import Tensor

from .operator import CurvatureOperator


class Identity(CurvatureOperator):
    """The identity matrix. Nearly free, and another quantity: see docs/method.md, section 4.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2)
        >>> Identity(model, (torch.ones(1, 1), torch.tensor([0]))).matvec(torch.arange(4.0))
        tensor([0., 1., 2., 3.])
    """

    def _product(self, vector: Tensor) -> Tensor:
        return vector
