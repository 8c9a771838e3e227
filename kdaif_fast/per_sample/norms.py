"""Norms of every sample's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .._tree import as_real, product_dtype
from .groups import Group, blocks, visit_groups
from .independence import require_independence
from .recording import Recording


@torch.inference_mode(False)
def per_sample_grad_norms(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    params: Params | None = None,
    per_parameter: bool = False,
    check_independence: bool = False,
) -> Tensor | dict[str, Tensor]:
    """||grad l_i||, the Euclidean norm of every sample's gradient, mostly without forming the gradients.

    For a linear layer ||sum_t b_t a_t^T||^2 = sum_{t, t'} <a_t, a_t'> <b_t, b_t'>: over T positions, whichever of this
    and the gradient itself is cheaper is computed, a sample at a time.

    Args:
        model: any module whose samples are independent (BatchNorm in eval mode), in train or eval mode.
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        per_parameter: the norm of every parameter's part by itself.
        check_independence: make sure that samples do not influence each other's outputs, at the cost of two more
            forward passes.

    Returns:
        [N], or {name: [N]}; float32, or float64 for float64 parameters.

    Raises:
        ValueError: a module that mixes samples, a loss that is not [N].

    Memory: that of one training step without the gradients; parameters that are used in several ways (tied ones) are
        materialised in blocks of samples.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> per_sample_grad_norms(model, batch)
        tensor([0.7071, 1.4142])
    """
    if check_independence:
        require_independence(model, batch)
    recording = Recording(model, batch, loss, params, checks=check_independence)
    N, device = recording.samples, recording.losses.device
    dtype = product_dtype(recording.parameters.values())
    total = torch.zeros(N, dtype=dtype, device=device)
    squares = {name: torch.zeros_like(total) for name in recording.parameters} if per_parameter else {}

    def receive(group: Group) -> None:
        term = group.single()
        if term is not None:
            (name,) = group.names
            parts = {name: term.squared_norms()}
        else:
            parts = {}
            for start, stop in blocks(group, N):
                for name, grads in group.grads(start, stop).items():
                    square = as_real(grads.reshape(stop - start, -1)).to(dtype).square().sum(1)
                    parts.setdefault(name, torch.zeros_like(total))[start:stop] = square
        for name, square in parts.items():
            if per_parameter:
                squares[name] += square
            else:
                total.add_(square)

    visit_groups(recording, receive)
    if per_parameter:
        return {name: square.sqrt() for name, square in squares.items()}
    return total.sqrt()
