"""The Hessian of the mean loss."""

from torch import Tensor

from .operator import CurvatureOperator


class Hessian(CurvatureOperator):
    """Second derivative of the mean loss in the parameters; indefinite away from a minimum of non-convex models.

    One differentiable gradient is kept, so that a product is one backward pass (Pearlmutter 1994).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> sorted(Hessian(model, batch).matvec(direction))
        ['bias', 'weight']
    """

    def _product(self, vector: Tensor) -> Tensor:
        return self.objective.full_hessian(vector)
