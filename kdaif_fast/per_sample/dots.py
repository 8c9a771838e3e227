"""Dot products of every sample's gradient with directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .._tree import product_dtype
from .directions import read_directions
from .independence import require_independence
from .paths import Path
from .recording import Recording
from .terms import Term


@torch.inference_mode(False)
def per_sample_grad_dots(
    model: nn.Module,
    batch: Any,
    direction: Tensor | Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    params: Params | None = None,
    check_independence: bool = False,
) -> Tensor:
    """<grad l_i, direction> for every sample i: how fast each loss grows along the direction.

    One forward and one backward pass whatever the number of directions; no sample's gradient is kept. A layer that is
    linear in its parameters gives <b_i, layer(a_i; V)>, with a_i its input and b_i the gradient at its output.

    Args:
        model: any module whose samples are independent (BatchNorm in eval mode), in train or eval mode.
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        direction: flat [P], in the order of model.named_parameters(), or a dictionary shaped like the parameters; K of
            them stacked: [K, P], or a dictionary of tensors with a leading axis K.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        check_independence: make sure that samples do not influence each other's outputs, at the cost of two more
            forward passes.

    Returns:
        [N], or [N, K] for stacked directions; float32, or float64 for float64 parameters.

    Raises:
        ValueError: a direction that does not fit the parameters, a module that mixes samples, a loss that is not [N].

    Memory: that of one training step, without the gradients.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> per_sample_grad_dots(model, batch, {"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]])})
        tensor([-0.5000, -1.0000])
    """
    if check_independence:
        require_independence(model, batch)
    recording = Recording(model, batch, loss, params, checks=check_independence)
    directions, is_one = read_directions(direction, recording.parameters)
    dots = Dots(recording, directions)

    def receive(terms: list[tuple[Path, Term]]) -> None:
        for path, term in terms:
            dots.add(term.dots(dots.along(path)))

    recording.visit(receive)
    return dots.total[:, 0] if is_one else dots.total


class Dots:
    """Dot products being summed over the terms of a recording: `total`, [N, K]."""

    def __init__(self, recording: Recording, directions: dict[str, Tensor]) -> None:
        some = next(iter(directions.values()))
        dtype = product_dtype(recording.parameters.values())
        self.total = torch.zeros(recording.samples, len(some), dtype=dtype, device=recording.losses.device)
        self._directions = directions
        self._pushed: dict[Path, Tensor] = {}

    def along(self, path: Path) -> Tensor:
        """The directions at the end of a path: [K, *shape]."""
        if path not in self._pushed:
            self._pushed[path] = path.push(self._directions)
        return self._pushed[path]

    def add(self, dots: Tensor) -> None:
        """Add one term's: [N, K]."""
        self.total += dots
