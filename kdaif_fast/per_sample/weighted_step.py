"""The one-pass weighted step: losses, influence, weights and weighted gradients from one forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .._tree import wide_dtype
from .delivery import deliver
from .directions import read_directions
from .dots import Dots
from .independence import require_independence
from .paths import Path
from .recording import Recording, without_autocast
from .terms import Term

WeightFunction = Callable[[Tensor], Tensor]
"""weight_fn(phi) -> weights, [N] -> [N]"""


class WeightedStep(NamedTuple):
    """What weighted_step returns, each [N]; phi is None if no direction was given."""

    losses: Tensor
    phi: Tensor | None
    weights: Tensor


@torch.inference_mode(False)
def weighted_step(
    model: nn.Module,
    batch: Any,
    weights: Tensor | None = None,
    *,
    weight_fn: WeightFunction | None = None,
    direction: Tensor | Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    params: Params | None = None,
    scaler: torch.amp.GradScaler | None = None,
    divisor: float | None = None,
    check_independence: bool = False,
) -> WeightedStep:
    """Add the gradient of sum_i w_i l_i / divisor to `.grad`, with weights from the influence measured on the way.

    Takes the place of the forward and backward pass of a training step: one forward pass; one backward pass over the
    samples' part of the graph, which gives phi_i = -<direction, grad l_i> at every layer as it goes; the weights
    w = weight_fn(phi); and the parameters' gradients with the weights already in them. Nothing is computed twice, and
    the weights are those of the very network, dropout masks included, that the gradients are of.

    Works under autocast, with accumulation over batches (give `divisor`), and with DistributedDataParallel and hooks on
    parameters, which see the weighted gradients as they would after a backward pass of their own. Checkpointed layers
    (use_reentrant=False) are run again once for each of their operations.

    Args:
        model: any module whose samples are independent (BatchNorm in eval mode), in train or eval mode.
        batch: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        weights: [N], if they are known already; else `direction` and `weight_fn` say what they are.
        weight_fn: phi [N] -> weights [N]; sigmoid_weights, for example, whose `scale` is then that of this batch alone
            unless a number is given.
        direction: s = (C + damping I)^-1 grad L_val, without a minus sign: `solution.x` of
            `phi, solution = influence_scores(..., return_solution=True)`, with the same `params`. Flat [P], in the
            order of model.named_parameters(), or a dictionary shaped like the parameters.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules, which get gradients and count for phi;
            default all that require grad.
        scaler: of mixed precision; gradients are scaled by it, as scaler.step expects. phi and losses are not.
        divisor: not 0; what the weighted sum of losses is divided by; default N, which makes it a mean.
        check_independence: make sure that samples do not influence each other's outputs, at the cost of two more
            forward passes.

    Returns:
        Losses, phi (positive: harmful, as everywhere) and weights, each [N], without graphs.

    Raises:
        ValueError: neither weights nor a weight_fn with its direction; a divisor of 0; weights that are not [N]; what
            per_sample_grad_dots raises. `.grad` is untouched then.

    Memory: that of a training step, and for each layer either its input and output gradient or its per-sample weight
        gradients, whichever is cheaper.

    Source: Wu et al., "Knowledge Distillation with Adapted Weight", arXiv 2501.02705, for phi and w.

    Example:
        >>> import torch
        >>> from kdaif_fast import sigmoid_weights
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> direction = {"weight": torch.tensor([[1.0, 0.0], [0.0, -1.0]])}
        >>> step = weighted_step(model, batch, weight_fn=sigmoid_weights, direction=direction)
        >>> step.phi
        tensor([ 0.5000, -0.5000])
        >>> bool(step.weights[0] < 1 < step.weights[1])
        True
        >>> model.weight.grad.shape
        torch.Size([2, 2])
    """
    if weights is None and (weight_fn is None or direction is None):
        raise ValueError("weighted_step needs weights, or a weight_fn together with the direction that phi is along")
    if weights is not None and weight_fn is not None:
        raise ValueError("weighted_step got both weights and a weight_fn; expected one of them")
    if divisor == 0:
        raise ValueError("weighted_step: divisor is 0, expected the number of samples, or None for that of this batch")
    if check_independence:
        require_independence(model, batch)
    device = next(model.parameters()).device
    scale = None if scaler is None else scaler.scale(torch.ones((), device=device))
    recording = Recording(model, batch, loss, params, trains=True, scale=scale, checks=check_independence)
    if weights is not None:
        weights = _checked(weights, recording.samples, "weights")
    if direction is None:
        phi, terms = None, _collect(recording)
    else:
        phi, terms = _contract(recording, direction, scale)
    with torch.no_grad(), without_autocast(recording.losses.device):
        if weights is None:
            assert phi is not None
            assert weight_fn is not None
            weights = _checked(weight_fn(phi.clone()), recording.samples, "what weight_fn returned")
        weights = weights.detach().to(device=recording.losses.device)
        by_sample = weights.to(torch.promote_types(weights.dtype, wide_dtype(recording.losses.dtype)))
        by_sample = by_sample / (recording.samples if divisor is None else divisor)
        deliver(terms, by_sample, recording.reached())
    return WeightedStep(recording.losses, phi, weights)


def _contract(
    recording: Recording, direction: Tensor | Mapping[str, Tensor], scale: Tensor | None
) -> tuple[Tensor, list[tuple[Path, Term]]]:
    directions, is_one = read_directions(direction, recording.parameters)
    if not is_one:
        raise ValueError("direction has several directions stacked, expected one")
    dots = Dots(recording, directions, keeps=True)
    recording.visit(dots.take)
    phi = dots.total()[:, 0].neg()
    return (phi if scale is None else phi / scale), dots.kept


def _collect(recording: Recording) -> list[tuple[Path, Term]]:
    kept: list[tuple[Path, Term]] = []
    recording.visit(kept.extend)
    return kept


def _checked(weights: Any, samples: int, name: str) -> Tensor:
    if not isinstance(weights, Tensor) or tuple(weights.shape) != (samples,) or weights.is_complex():
        form = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weighted_step: {name} is {form}, expected a tensor of shape ({samples},), one per sample")
    return weights
