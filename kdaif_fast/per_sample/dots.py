"""Dot products of every sample's gradient with one direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._model import Loss, Params
from .._objective import Objective
from .._tree import as_vector


def per_sample_grad_dots(
    model: nn.Module,
    batch: Any,
    direction: Tensor | Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    params: Params | None = None,
) -> Tensor:
    """<grad l_i, direction> for every sample i: [N], float32 or float64; how fast each loss grows along the direction.

    All N come from one directional derivative: the outputs' change along the direction, contracted with the gradient
    of each sample's loss in its outputs. No sample's gradient is formed.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout).
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        direction: flat [P], or a dictionary shaped like the parameters.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.

    Raises:
        ValueError: a direction that does not fit the parameters, a module that mixes samples, a loss that is not [N].

    Memory: the graph of one forward and one backward pass over the batch.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> per_sample_grad_dots(model, batch, {"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]])})
        tensor([-0.5000, -1.0000])
    """
    objective = Objective(model, batch, loss, params)
    objective.require_second_derivatives()
    return objective.dots(as_vector(direction, objective.parameters, "direction"))
