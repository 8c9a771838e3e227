"""The right-hand sides of the solve: gradients of validation losses, over the samples of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._data import Batches
from .._distributed import Group, add_over_ranks, gather_over_ranks, rank_in, together
from .._model import Loss, Params
from .._objective import Objective
from .loaders import samples_in
from .queries import query_gradients


def validation_gradients(
    model: nn.Module,
    validation: Batches,
    queries: str,
    *,
    loss: Loss | None,
    params: Params | None,
    group: Group,
    progress: bool | None,
) -> tuple[Tensor, list[int]]:
    """Gradients [K, P] of the losses that are asked about, and what each is of; the same on every rank of a group.

    Over ranks: the mean over all their samples; the classes of all of them; or the samples of the first rank, then
    those of the second, and so on.
    """
    with together(group, validation.device or torch.device("cpu")):
        rows, labels, counts = _of_this_rank(model, validation, queries, loss, params, group, progress)
    if group is None:
        return rows, labels
    return _over_ranks(rows, labels, counts, queries, group)


def _of_this_rank(
    model: nn.Module,
    validation: Batches,
    queries: str,
    loss: Loss | None,
    params: Params | None,
    group: Group,
    progress: bool | None,
) -> tuple[Tensor, list[int], list[int]]:
    """Gradients, what each is of, and how many samples it is the mean of; the last for a group only."""
    if queries == "mean" and validation.is_one:  # a plain backward pass is the quickest
        ((label, batch),) = validation
        objective = Objective(model, batch, loss, params, label)
        objective.require_finite()
        rows = (objective.gradient() / objective.samples)[None]
        if not rows.isfinite().all():
            raise ValueError(f"{label} has a gradient that is not finite")
        return rows, [0], [objective.samples]
    rows, labels = query_gradients(model, validation, queries, loss=loss, params=params, progress=progress)
    return rows, labels, [] if group is None else _counts(validation, queries, labels)


def _counts(validation: Batches, queries: str, labels: list[int]) -> list[int]:
    """How many samples each query is the mean of."""
    if queries != "per_class":
        return [samples_in(validation)] if queries == "mean" else [1] * len(labels)
    counts = dict.fromkeys(labels, 0)
    for _, batch in validation:
        for number, count in zip(*batch.targets.unique(return_counts=True), strict=True):
            counts[int(number)] += int(count)
    return list(counts.values())


def _over_ranks(
    rows: Tensor, labels: list[int], counts: list[int], queries: str, group: Group
) -> tuple[Tensor, list[int]]:
    everyone = gather_over_ranks((labels, counts), group)
    if queries == "per_sample":
        first = sum(len(theirs) for theirs, _ in everyone[: rank_in(group)])
        total = sum(len(theirs) for theirs, _ in everyone)
        result, where = rows.new_zeros(total, rows.shape[1]), list(range(first, first + len(rows)))
        names = list(range(total))
    else:
        names = sorted({label for theirs, _ in everyone for label in theirs})
        result, where = rows.new_zeros(len(names), rows.shape[1]), [names.index(label) for label in labels]
    result[where] = rows * rows.new_tensor(counts)[:, None]
    add_over_ranks(result, group)
    if queries != "per_sample":
        totals = [
            sum(c for theirs, n in everyone for label, c in zip(theirs, n, strict=True) if label == name)
            for name in names
        ]
        result /= result.new_tensor(totals)[:, None]
    return result, names
