"""Dot products between the gradients of two batches' samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params
from .._tree import as_real, product_dtype
from .groups import Group, blocks, visit_groups
from .recording import Recording
from .terms import LinearTerm
from .terms.base import BLOCK_ELEMENTS


@torch.inference_mode(False)
def pairwise_grad_dots(
    model: nn.Module,
    batch_a: Any,
    batch_b: Any,
    *,
    loss: Loss | None = None,
    params: Params | None = None,
) -> Tensor:
    """<grad l_i, grad l_j> for every sample i of one batch and j of another: [N_a, N_b].

    Args:
        model: any module whose samples are independent (BatchNorm in eval mode), in train or eval mode.
        batch_a: (inputs, targets[, teacher_logits]) or a mapping with those keys.
        batch_b: likewise; may be the same, for the Gram matrix of its gradients.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.

    Returns:
        [N_a, N_b], float32, or float64 for float64 parameters.

    Raises:
        ValueError: a module that mixes samples, a loss that is not [N].

    Memory: that of a training step on each batch, the inputs and output gradients of all layers of batch_b, and blocks
        of per-sample gradients of one layer at a time.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> pairwise_grad_dots(model, batch, batch)
        tensor([[ 0.5000,  0.0000, -0.5000],
                [ 0.0000,  0.5000,  0.5000],
                [-0.5000,  0.5000,  1.0000]])
    """
    one = Recording(model, batch_a, loss, params, name="batch_a")
    other = one if batch_b is batch_a else Recording(model, batch_b, loss, params, name="batch_b")
    dtype = product_dtype(one.parameters.values())
    total = torch.zeros(one.samples, other.samples, dtype=dtype, device=one.losses.device)
    kept: list[Group] = []
    if other is not one:
        visit_groups(other, kept.append)

    def receive(group: Group) -> None:
        for partner in [group] if other is one else [g for g in kept if g.names & group.names]:
            total.add_(_dots(group, partner, one.samples, other.samples, dtype))

    visit_groups(one, receive)
    return total


def _dots(left: Group, right: Group, N_a: int, N_b: int, dtype: torch.dtype) -> Tensor:
    a, b = left.single(), right.single()
    alike = left.members[0][0].kind == right.members[0][0].kind
    if alike and isinstance(a, LinearTerm) and isinstance(b, LinearTerm) and a.transposed == b.transposed:
        T, S = a.inputs.shape[1], b.inputs.shape[1]
        I, O = a.matrix  # noqa: E741
        # Between positions: T S (I + O) products a pair; between gradients: I O a pair, and T I O to form each.
        if T * S * (I + O) <= I * O:
            return _by_positions(a, b, dtype)
    rows = []
    for start, stop in blocks(left, N_a):
        G = left.grads(start, stop)
        columns = []
        for begin, end in blocks(right, N_b):
            H = right.grads(begin, end)
            shared = [name for name in G if name in H]
            pairs = (
                (as_real(G[name].reshape(stop - start, -1)), as_real(H[name].reshape(end - begin, -1)))
                for name in shared
            )
            columns.append(sum((g.to(dtype) @ h.to(dtype).T for g, h in pairs), start=torch.zeros((), dtype=dtype)))
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def _by_positions(a: LinearTerm, b: LinearTerm, dtype: torch.dtype) -> Tensor:
    """sum_{t, s} <a_it, a_js> <b_it, b_js>, for blocks of samples i."""
    (N, T), (M, S) = a.inputs.shape[:2], b.inputs.shape[:2]
    step = max(1, BLOCK_ELEMENTS // max(1, T * M * S))
    rows = []
    for start in range(0, N, step):
        stop = min(start + step, N)
        products = [
            x[start:stop].reshape(-1, x.shape[2]).to(dtype) @ y.reshape(-1, y.shape[2]).to(dtype).T
            for x, y in ((a.inputs, b.inputs), (a.output_grads, b.output_grads))
        ]
        rows.append((products[0] * products[1]).view(stop - start, T, M, S).sum((1, 3)))
    return torch.cat(rows)
