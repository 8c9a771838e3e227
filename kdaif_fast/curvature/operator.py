"""What every curvature operator can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._tree import as_dict, as_vectors, vector_dtype


def require_real(parameters: Mapping[str, Tensor]) -> None:
    """Raise TypeError for complex parameters: curvature is real, and symmetric in real and imaginary parts only."""
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise TypeError(
                f"parameter {name!r} is {parameter.dtype}, and curvature is over real parameters: keep it as "
                "torch.view_as_real(parameter), and view that as complex in the model"
            )


Direction = TypeVar("Direction", Tensor, Mapping[str, Tensor])

MOST_DENSE = 20_000
"""The most parameters that a matrix is formed for: 3.2 GB in float64."""


class CurvatureOperator(ABC):
    """A symmetric P x P matrix C, given by its products with vectors over the parameters.

    Vectors are flat, [P] in the order of the parameters, or dictionaries shaped like the parameters; K of them are
    stacked along a first axis, [K, P] or dictionaries of tensors with a leading K.
    """

    parameters: dict[str, Tensor]
    """The parameters that the operator's P axes stand for, in order."""

    @abstractmethod
    def _products(self, vectors: Tensor) -> Tensor:
        """C times every row of [K, P]."""

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def device(self) -> torch.device:
        """Where vectors are."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products: that of the parameters, float32 at least."""
        return vector_dtype(self.parameters.values())

    def matvec(self, direction: Direction) -> Direction:
        """C v, in the form that v has: flat [P], or a dictionary shaped like the parameters."""
        product = self._products(as_vectors(direction, self.parameters, "direction", stacked=False))
        if isinstance(direction, Tensor):
            return product[0]
        return {name: rows[0] for name, rows in as_dict(product, self.parameters).items()}

    def matmat(self, directions: Direction) -> Direction:
        """C v for K vectors at once, in the form that they have: [K, P], or a dictionary of [K, *shape].

        One linearisation serves them all, and the matrix products have K times the rows.
        """
        products = self._products(as_vectors(directions, self.parameters, "directions", stacked=True))
        return products if isinstance(directions, Tensor) else as_dict(products, self.parameters)

    def diagonal(self, probes: int = 32, seed: int = 0) -> Tensor:
        """Estimate of C's diagonal [P]: the mean of v * C v over random signs v (Bekas et al. 2007).

        Costs one product a probe. The error of an entry is about the size of the rest of its row / sqrt(probes).
        """
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for signs in self._signs(probes, seed):
            total += (signs * self._products(signs)).sum(0)
        return total / probes

    def mean_eigenvalue(self, probes: int = 8, seed: int = 0) -> float:
        """Estimate of trace(C) / P: the mean of v . C v / P over random signs v (Hutchinson 1989).

        Costs one product a probe; its relative error is about sqrt(2 / (probes * number of large eigenvalues)).
        The signs come from their own generator, so the result repeats and torch's global state is left alone.
        """
        total = sum(float((signs * self._products(signs)).sum()) for signs in self._signs(probes, seed))
        return total / (probes * self.size)

    def _signs(self, probes: int, seed: int) -> list[Tensor]:
        """Random signs in stacks [K, P] of a few vectors each."""
        if probes < 1:
            raise ValueError(f"probes is {probes}, expected at least 1")
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (probes, self.size), generator=generator).mul_(2).sub_(1)
        return list(signs.to(device=self.device, dtype=self.dtype).split(8))

    def dense(self) -> Tensor:
        """C itself, [P, P].

        Raises:
            ValueError: more than 20,000 parameters; says how much memory the matrix would take.
        """
        if self.size > MOST_DENSE:
            memory = self.size**2 * torch.finfo(self.dtype).bits / 8e9
            raise ValueError(
                f"the matrix of {self.size:,} parameters would take {memory:,.0f} GB; dense matrices are formed for up "
                f"to {MOST_DENSE:,}"
            )
        rows = torch.eye(self.size, dtype=self.dtype, device=self.device).split(64)
        return torch.cat([self._products(block) for block in rows])

    def to_scipy(self, damping: float = 0.0) -> Any:
        """C + damping I as a scipy.sparse.linalg.LinearOperator on float64 arrays, for SciPy's solvers."""
        from scipy.sparse.linalg import LinearOperator

        def products(columns: Any) -> Any:
            writable = columns if columns.flags.writeable else columns.copy()  # torch warns of others
            matrix = torch.as_tensor(writable).reshape(self.size, -1)
            rows = matrix.T.to(device=self.device, dtype=self.dtype)
            result = (self._products(rows) + damping * rows).double().cpu().numpy()
            return result.T.reshape(columns.shape)  # SciPy asks with [P], [P, 1] and [P, K]

        return LinearOperator(
            (self.size, self.size), matvec=products, rmatvec=products, matmat=products, dtype="float64"
        )
