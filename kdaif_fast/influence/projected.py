"""Scores from randomly projected gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._model import Loss, Params, plain_model
from .checkpoints import Checkpoint, at_checkpoint, keeps_state, read_checkpoints
from .projected_gradients import ProjectedGradients


@torch.inference_mode(False)
def projected_scores(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    loss: Loss | None = None,
    params: Params | None = None,
    queries: str = "mean",
    damping: float | Literal["auto"] = "auto",
    method: str = "factored",
    dims: int = 512,
    projection: str = "normal",
    seed: int = 0,
    memory: int = 1 << 29,
    checkpoints: Iterable[Checkpoint] | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Scores phi [N] from randomly projected gradients, TRAK-like or LoGra-like; phi > 0 means harmful.

    phi_i = - <R g_val, (F^T F / N + damping I)^-1 R g_i> with F the projected gradients R g_i of all training samples:
    influence with the empirical Fisher matrix as curvature, in a few random directions. A rough but cheap ranking; with
    as many directions as parameters it is exact for that curvature. `ProjectedGradients` keeps F for further queries.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged.
        train: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of batches,
            which is gone through once (once a checkpoint).
        val: the validation samples, in the same forms.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        queries: "mean": the mean validation loss; "per_sample": the loss of each validation sample; "per_class": the
            mean loss of the validation samples of each class, in ascending order of the classes.
        damping: added to F^T F / N; "auto" is 0.1 times its mean eigenvalue, in each block.
        method: "factored": every parameter by itself, layer inputs and output gradients projected before they are
            multiplied; "dense": one projection of all parameters together.
        dims: how many numbers to keep, of each parameter (factored) or altogether (dense).
        projection: "normal" or "rademacher", the distribution of the random entries.
        seed: of the projections; checkpoint c has seed + c.
        memory: bytes of the projection that "dense" may keep; a larger one is made again for every block of samples.
        checkpoints: states of the model, as for tracin_scores, whose scores are averaged; default the model as it is.
        progress: show progress bars; None shows them for loaders on a terminal only.

    Returns:
        [N], or [N, K] for K queries; float32 (float64 for float64 models), on the model's device.

    Raises:
        TypeError, ValueError: arguments that do not fit together; a sample whose loss or gradient is not finite;
            damping too small for the matrix to be inverted.

    Memory: the features [N, k] and what `ProjectedGradients` says. To have the features in a file, use that.

    Source: Park et al. 2023 (TRAK, arXiv 2303.14186); Choe et al. 2024 (LoGra, arXiv 2405.13954).

    Example:
        >>> import torch, kdaif_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> train = torch.randn(20, 4), torch.randint(0, 3, (20,))
        >>> val = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> kdaif_fast.projected_scores(model, train, val, dims=6).shape
        torch.Size([20])
    """
    plain = plain_model(model)

    def scores(c: int) -> Tensor:
        features = ProjectedGradients(
            plain,
            train,
            loss=loss,
            params=params,
            method=method,
            dims=dims,
            projection=projection,
            seed=seed + c,
            memory=memory,
            progress=progress,
            name="train",
        )
        return features.scores(val, queries=queries, damping=damping, progress=progress)

    if checkpoints is None:
        return scores(0)
    states = read_checkpoints(checkpoints)
    total: Tensor | None = None
    with keeps_state(plain):
        for c, state in enumerate(states):
            at_checkpoint(plain, state, f"checkpoints[{c}]")
            phi = scores(c)
            total = phi if total is None else total.add_(phi)
    assert total is not None
    return total / len(states)
