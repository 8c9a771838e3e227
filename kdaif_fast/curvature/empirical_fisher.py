"""The second moment of the samples' gradients."""

from torch import Tensor

from .._objective import Objective
from .streamed import StreamedCurvature


class EmpiricalFisher(StreamedCurvature):
    """(1/N) sum_i g_i g_i^T: g_i the gradient of sample i's own loss, with its given target.

    Positive semi-definite, of rank N at most. Near a good fit it is not the Fisher information matrix, and far from the
    Gauss-Newton matrix: Kunstner, Balles and Hennig 2019 (arXiv 1905.12558).

    Arguments and memory: those of `StreamedCurvature`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> bool((EmpiricalFisher(model, batch).dense().diagonal() >= 0).all())
        True
    """

    def _batch_products(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        grads = objective.output_grads
        dots = objective.output_dots(grads, objective.push(vectors)).T
        return objective.pull(scaled(grads, dots))


def scaled(grads: Tensor, factors: Tensor) -> Tensor:
    """Every sample's gradient at its outputs times its K factors: [N, ...], [K, N] -> [K, N, ...]."""
    return grads * factors.to(grads.dtype).reshape(*factors.shape, *[1] * (grads.dim() - 1))
