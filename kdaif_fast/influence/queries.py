"""The gradients that influence is asked about: of the mean validation loss, of every sample, or of every class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._data import Batches
from .._model import Batch, Loss, Params
from .._tree import wide_dtype
from .gradients import record, require_finite_rows, sample_gradients, weighted_gradients
from .progress import track

QUERIES = ("mean", "per_sample", "per_class")


@torch.inference_mode(False)
def query_gradients(
    model: nn.Module,
    data: Batches,
    queries: str,
    *,
    loss: Loss | None = None,
    params: Params | None = None,
    progress: bool | None = False,
) -> tuple[Tensor, list[int]]:
    """Gradients [K, P] of K validation losses, and what each is of.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged.
        data: the validation samples, gone through once.
        queries: "mean", the mean loss of all samples (K = 1); "per_sample", the loss of every sample; "per_class", the
            mean loss of the samples of each class, for integer targets [N].
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        progress: show a progress bar; None shows it on a terminal only.

    Returns:
        [K, P], in the order of model.named_parameters(), float32, or float64 for float64 parameters; and K labels:
        [0], the samples' numbers, or the classes in ascending order.

    Raises:
        TypeError, ValueError: queries of another name, or per class without integer targets; a loss or a gradient that
            is not finite (names the batch); what the model and the loss cannot do.

    Memory: that of a training step, and the result; while it is put together, once more one of its parts.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> val = Batches((torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 0])), "val")
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> query_gradients(model, val, "per_class")
        (tensor([[-0.3333, -0.1667,  0.3333,  0.1667],
                [ 0.0000,  0.5000,  0.0000, -0.5000]]), [0, 1])
    """
    check_queries(queries)
    if queries == "per_sample":
        return _per_sample(model, data, loss, params, progress)
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for label, batch in track(data, f"gradients of {data.name}", progress):
        recording = record(model, batch, loss, params, label)
        classes, weights = membership(batch, queries, label, recording.losses)
        grads = weighted_gradients(recording, weights)
        if not grads.isfinite().all():
            raise ValueError(f"{label} has a gradient that is not finite")
        numbers = weights.sum(1).tolist()
        for j, number in enumerate(classes):
            if number in sums:
                sums[number] += grads[j]
            else:
                sums[number] = grads[j].clone() if len(classes) > 1 else grads[j]
            counts[number] = counts.get(number, 0) + int(numbers[j])
    labels = sorted(sums)
    some = sums[labels[0]]
    rows = some.new_empty(len(labels), len(some))
    for k, number in enumerate(labels):
        torch.div(sums.pop(number), counts[number], out=rows[k])
    return rows, labels


def _per_sample(
    model: nn.Module, data: Batches, loss: Loss | None, params: Params | None, progress: bool | None
) -> tuple[Tensor, list[int]]:
    pieces = []
    for label, batch in track(data, f"gradients of {data.name}", progress):
        pieces.append(sample_gradients(record(model, batch, loss, params, label)))
        require_finite_rows(pieces[-1], label)
    if len(pieces) == 1:
        return pieces[0], list(range(len(pieces[0])))
    rows = pieces[0].new_empty(sum(map(len, pieces)), pieces[0].shape[1])
    stop = len(rows)
    while pieces:  # freed one by one
        piece = pieces.pop()
        rows[stop - len(piece) : stop] = piece
        stop -= len(piece)
    return rows, list(range(len(rows)))


def check_queries(queries: str) -> None:
    """Raise ValueError unless queries is one of those there are."""
    if not isinstance(queries, str) or queries not in QUERIES:
        raise ValueError(f"queries is {queries!r}, expected one of {', '.join(map(repr, QUERIES))}")


def membership(batch: Batch, queries: str, label: str, like: Tensor) -> tuple[list[int], Tensor]:
    """The queries "mean" (one, 0) or "per_class" that a batch has samples of; and which samples, as ones in [K, N]."""
    if queries == "mean":
        return [0], torch.ones(1, len(like), dtype=wide_dtype(like.dtype), device=like.device)
    targets = batch.targets
    is_integer = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())
    if not is_integer or tuple(targets.shape) != (len(like),):
        form = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"queries is 'per_class', but the targets of {label} are {form}, expected class indices: integers of shape "
            f"({len(like)},)"
        )
    classes, place = targets.to(like.device).unique(return_inverse=True)
    ones = torch.arange(len(classes), device=like.device).unsqueeze(1) == place
    return [int(number) for number in classes.tolist()], ones.to(wide_dtype(like.dtype))
