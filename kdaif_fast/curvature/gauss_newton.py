"""The generalised Gauss-Newton matrix."""

from torch import Tensor

from .._objective import Objective
from .streamed import StreamedCurvature


class GaussNewton(StreamedCurvature):
    """(1/N) sum_i J_i^T H_i J_i: J_i the outputs' Jacobian, H_i the loss's Hessian in the outputs of sample i.

    Positive semi-definite for convex losses, hence safe for conjugate gradients; equal to the Hessian for models that
    are linear in their parameters. Source: Schraudolph 2002, "Fast curvature matrix-vector products", section 3.

    Arguments and memory: those of `StreamedCurvature`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> GaussNewton(model, batch).matvec(torch.ones(9)).shape
        torch.Size([9])
        >>> GaussNewton(model, torch.utils.data.DataLoader(list(zip(*batch)), 2)).matmat(torch.ones(4, 9)).shape
        torch.Size([4, 9])
    """

    def _batch_products(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        return objective.pull(objective.loss_hessian(objective.push(vectors)))
