"""The Fisher information matrix, with targets drawn from the model itself."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._distributed import Group, rank_in
from .._model import Loss, Params
from .._objective import Objective
from .._tree import wide_dtype
from .empirical_fisher import scaled
from .streamed import StreamedCurvature


class MonteCarloFisher(StreamedCurvature):
    """(1/N) sum_i E_y [g_i(y) g_i(y)^T], y drawn from what the model predicts for sample i.

    In expectation it is the Gauss-Newton matrix of cross-entropy ("categorical") or of half the squared error
    ("gaussian"). The same targets are drawn at every product, so that it is one matrix; it depends on the device, and
    on how a loader or a group of processes cuts the samples into batches, and on their order.

    Args:
        draws: targets drawn for each sample.
        likelihood: what the outputs mean: "categorical", logits along the last axis, every row of them by itself;
            or "gaussian", means of unit variance.
        seed: of the draws.
        model, data, loss, params, keep_graphs, memory, group: as for `StreamedCurvature`. The given targets and the
            loss are used for checks only.

    Memory: as `StreamedCurvature`, and `draws` times the outputs while a product is computed.

    Source: Martens 2020, "New insights and perspectives on the natural gradient method", section 9.2.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> fisher = MonteCarloFisher(model, batch, draws=10)
        >>> bool((fisher.matvec(torch.ones(9)) == fisher.matvec(torch.ones(9))).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        draws: int = 1,
        likelihood: Literal["categorical", "gaussian"] = "categorical",
        seed: int = 0,
        loss: Loss | None = None,
        params: Params | None = None,
        keep_graphs: bool = False,
        memory: int | None = None,
        group: Group = None,
    ) -> None:
        if draws < 1:
            raise ValueError(f"draws is {draws}, expected at least 1")
        if likelihood not in ("categorical", "gaussian"):
            raise ValueError(f"likelihood is {likelihood!r}, expected 'categorical' or 'gaussian'")
        self._draws, self._likelihood, self._seed = draws, likelihood, seed
        super().__init__(model, data, loss=loss, params=params, keep_graphs=keep_graphs, memory=memory, group=group)

    def _batch_products(self, objective: Objective, vectors: Tensor, index: int) -> Tensor:
        outputs = objective.outputs.detach()
        generator = torch.Generator(outputs.device).manual_seed(
            self._seed + 1_000_003 * index + 998_244_353 * rank_in(self._group)
        )
        tangents = objective.push(vectors)
        total = torch.zeros_like(tangents)
        for _ in range(self._draws):
            grads = self._drawn_grads(outputs, generator)
            total += scaled(grads, objective.output_dots(grads, tangents).T)
        return objective.pull(total / self._draws)

    def _drawn_grads(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of -log p(y) at the outputs, y ~ p."""
        if self._likelihood == "gaussian":
            return torch.empty_like(outputs).normal_(generator=generator)
        probabilities = outputs.to(wide_dtype(outputs.dtype)).softmax(-1)
        # The first of independent clocks to ring is c with the probability of c's rate: no draw waits for a GPU.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        one_hot = torch.zeros_like(probabilities).scatter_(-1, clocks.argmin(-1, keepdim=True), 1)
        return (probabilities - one_hot).to(outputs.dtype)
