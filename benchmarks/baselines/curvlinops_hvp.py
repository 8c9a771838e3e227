"""Curvature products by curvlinops, whose operators multiply matrices of K columns."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loop_hvp import DoubleBackward, UnsupportedError

try:
    import curvlinops
except ImportError:
    curvlinops = None


class Curvlinops(DoubleBackward):
    """HessianLinearOperator and GGNLinearOperator; every product goes through the model again."""

    def linearise(self) -> None:
        """The operator, without its check that the data come in a fixed order."""
        if curvlinops is None:
            raise UnsupportedError("curvlinops is not installed")
        kind = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator"}[self.curvature]
        self.operator = getattr(curvlinops, kind)(
            self.model, nn.CrossEntropyLoss(), self.parameters, [self.batch], check_deterministic=False
        )

    def products(self, vectors: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        with sdpa_kernel(SDPBackend.MATH):
            return (self.operator @ vectors.T).T
