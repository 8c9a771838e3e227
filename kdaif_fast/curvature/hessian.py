"""The Hessian of the mean loss."""

from torch import Tensor

from .._objective import Objective
from ..batched import KeptBackward
from .streamed import StreamedCurvature


class Hessian(StreamedCurvature):
    """Second derivative of the mean loss in the parameters; indefinite away from a minimum of non-convex models.

    One differentiable gradient is kept, so that a product is one backward pass (Pearlmutter 1994).

    Arguments and memory: those of `StreamedCurvature`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> sorted(Hessian(model, batch).matvec(direction))
        ['bias', 'weight']
    """

    def _batch_products(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        return objective.full_hessian(vectors)

    def _walks(self, objective: Objective) -> list[KeptBackward]:
        return [] if objective.differentiating is None else [objective.differentiating]
