"""TracIn: gradient dot products, summed over checkpoints of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params, plain_model
from .checkpoints import Checkpoint, at_checkpoint, keeps_state, read_checkpoints
from .gradients import gradient_dots, read_data, record
from .progress import track
from .queries import check_queries, query_gradients


@torch.inference_mode(False)
def tracin_scores(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    checkpoints: Iterable[Checkpoint],
    weights: Sequence[float] | None = None,
    loss: Loss | None = None,
    params: Params | None = None,
    queries: str = "mean",
    progress: bool | None = None,
) -> Tensor:
    """TracIn scores phi of every training sample, summed over checkpoints; phi > 0 means harmful.

    phi_i = - sum_c eta_c <grad L_val(theta_c), grad l_i(theta_c)>: to first order, by how much the training steps on
    sample i have raised the validation loss, if eta_c is the learning rate times the number of steps on each sample
    that checkpoint c stands for. There is no curvature in it, and no solve.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). Its own parameters,
            buffers and modes are put back afterwards, after an error too.
        train: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of batches,
            which is gone through once a checkpoint.
        val: the validation samples, in the same forms.
        checkpoints: states of the model, from one training run: state dicts; files of them (torch.save, read with
            weights_only=True, or .safetensors); or functions that take the model and either return a state dict or put
            the model into that state themselves.
        weights: eta, one number a checkpoint; default 1 for each.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        queries: "mean": the mean validation loss; "per_sample": the loss of each validation sample; "per_class": the
            mean loss of the validation samples of each class, in ascending order of the classes.
        progress: show progress bars; None shows them for loaders on a terminal only.

    Returns:
        [N], or [N, K] for K queries; float32 (float64 for float64 models), on the model's device.

    Raises:
        TypeError, ValueError: arguments that do not fit together; a checkpoint that does not fit the model; a sample
            whose loss or gradient is not finite. Each names the argument, and the sample.

    Memory: a copy of the model, the query gradients [K, P], the result, and a training step's on one batch.

    Source: Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent" (arXiv 2002.08484),
        section 3.2 (TracInCP), with the sign turned.

    Example:
        >>> import torch, kdaif_fast
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> checkpoints = [{"weight": torch.zeros(2, 2)}, {"weight": torch.eye(2)}]
        >>> train = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
        >>> val = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> kdaif_fast.tracin_scores(model, train, val, checkpoints=checkpoints, weights=[0.1, 0.05])
        tensor([-0.1064,  0.1174])
    """
    check_queries(queries)
    plain = plain_model(model)
    states = read_checkpoints(checkpoints)
    factors = _read_weights(weights, len(states))
    any_order = () if queries == "per_sample" else ("val",)
    chosen, (train_batches, val_batches) = read_data(plain, params, any_order=any_order, train=train, val=val)
    total: list[Tensor] = []
    with keeps_state(plain):
        for c, (state, factor) in enumerate(zip(states, factors, strict=True)):
            at_checkpoint(plain, state, f"checkpoints[{c}]")
            grads, _ = query_gradients(plain, val_batches, queries, loss=loss, params=chosen, progress=progress)
            what = f"checkpoint {c + 1} of {len(states)}"
            for index, (label, batch) in enumerate(track(train_batches, what, progress)):
                dots = gradient_dots(record(plain, batch, loss, chosen, label), grads, label).mul_(-factor)
                if c == 0:
                    total.append(dots)
                else:
                    total[index] += dots
    phi = torch.cat(total)
    return phi[:, 0] if queries == "mean" else phi


def _read_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    numbers = list(weights.tolist() if isinstance(weights, Tensor) else weights)
    if len(numbers) != count:
        raise ValueError(f"weights has {len(numbers)} entries, expected one for each of {count} checkpoints")
    for c, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"weights[{c}] is {number!r}, expected a finite number")
    return [float(number) for number in numbers]
