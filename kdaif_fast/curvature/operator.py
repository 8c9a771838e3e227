"""What every curvature operator can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .._objective import Objective
from .._tree import as_dict, as_vector, wide_dtype

Direction = TypeVar("Direction", Tensor, Mapping[str, Tensor])


class CurvatureOperator(ABC):
    """A symmetric P x P matrix C of the mean loss over a batch, given by its products.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout).
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys; or an `Objective` already made.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.

    Memory: the graph of one forward and one backward pass over the batch, kept as long as the operator.
    """

    def __init__(
        self,
        model: nn.Module | None,
        batch: Any,
        *,
        loss: Loss | None = None,
        params: Params | None = None,
    ) -> None:
        if isinstance(batch, Objective):
            self.objective = batch
        elif model is None:
            raise ValueError("model is None, expected a module")
        else:
            self.objective = Objective(model, batch, loss, params)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the operator's P axes stand for, in order."""
        return self.objective.parameters

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor:
        """C times a flat vector [P]."""

    def matvec(self, direction: Direction) -> Direction:
        """C v, in the form that v has: flat [P], or a dictionary shaped like the parameters."""
        vector = as_vector(direction, self.parameters, "direction")
        product = self._product(vector)
        return product if isinstance(direction, Tensor) else as_dict(product, self.parameters)

    def mean_eigenvalue(self, probes: int = 8, seed: int = 0) -> float:
        """Estimate of trace(C) / P: the mean of v . C v / P over random signs v (Hutchinson 1989).

        Costs one product a probe; its relative error is about sqrt(2 / (probes * number of large eigenvalues)).
        The signs come from their own generator, so the result repeats and torch's global state is left alone.
        """
        first = next(iter(self.parameters.values()))
        count = sum(parameter.numel() for parameter in self.parameters.values())
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for _ in range(probes):
            signs = torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1)
            vector = signs.to(device=first.device, dtype=wide_dtype(first.dtype))
            total += float(vector @ self._product(vector))
        return total / (probes * count)
