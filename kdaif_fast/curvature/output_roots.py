"""Gradients at a model's outputs whose second moment is the loss's curvature there: what Kronecker factors are fed.

With R_i R_i^T = H_i, the Hessian of sample i's loss in its outputs, the Gauss-Newton matrix is the mean of
sum_c (J_i^T R_i e_c) (J_i^T R_i e_c)^T: one backward pass for each column c. A random combination of the columns, with
coefficients of mean 0 and variance 1, has the same second moment in expectation, and takes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from .._model import DistillationLoss, Loss
from .._tree import wide_dtype
from ..per_sample.recording import Recording

Fisher = Literal["monte_carlo", "ggn", "empirical"]

FISHERS: tuple[str, ...] = get_args(Fisher)

MOST_OUTPUTS = 512
"""The most outputs of a sample for which a loss without a closed form has its Hessian taken apart."""

_BLOCK_ELEMENTS = 1 << 22


def cotangents(
    recording: Recording, loss: Loss | None, fisher: Fisher, draws: int, generator: torch.Generator, name: str
) -> Iterator[Tensor | None]:
    """Gradients at the outputs, one after the other, whose squares add up to each sample's curvature.

    None stands for the gradient of the losses themselves.

    Args:
        recording: of a batch.
        loss: that of the recording.
        fisher: "empirical": the losses' gradient. "ggn": the columns of a root of the Hessian. "monte_carlo": random
            combinations of these; for cross-entropy, labels drawn from what the model predicts.
        draws: how many of the latter.
        generator: of the draws, on the CPU; every sample takes its own, in order, so that batches do not matter.
        name: what errors call the batch.
    """
    if fisher == "empirical":
        yield None
        return
    outputs = recording.outputs
    if outputs is None:
        raise ValueError(
            f"{name}: the model returns no single tensor, or the loss depends on parameters by itself, so that it has "
            "no Hessian in the outputs; use fisher='empirical'"
        )
    if loss is None or isinstance(loss, DistillationLoss):
        parts = _softmax_parts(recording, outputs, loss or DistillationLoss())
        if fisher == "ggn":
            for scale, root in parts:
                p = root.square()
                for c in range(outputs.shape[1]):
                    factor = scale * root[:, c : c + 1]
                    column = p * -factor
                    column[:, c : c + 1] += factor
                    yield column.to(outputs.dtype)
            return
        for uniform in _uniform(len(outputs), draws * len(parts), generator, outputs).split(len(parts), 1):
            yield _drawn_labels(parts, uniform).div_(math.sqrt(draws)).to(outputs.dtype)
        return
    root = _dense_roots(recording, outputs, name)  # [N, D, D]
    if fisher == "ggn":
        for column in root.unbind(2):
            yield column.to(outputs.dtype).view_as(outputs)
        return
    for uniform in _uniform(len(root), draws * root.shape[2], generator, root).split(root.shape[2], 1):
        signs = torch.where(uniform < 0.5, -1.0, 1.0).to(root.dtype)
        column = torch.bmm(root, signs.unsqueeze(2)).div_(math.sqrt(draws))
        yield column.to(outputs.dtype).view_as(outputs)


def _softmax_parts(recording: Recording, outputs: Tensor, loss: DistillationLoss) -> list[tuple[Tensor, Tensor]]:
    """H = sum of w (diag(p) - p p^T) over the parts, as (sqrt(w) [N, 1], sqrt(p) [N, V]) of each.

    The cross-entropy has p = softmax(s), the distillation part p = softmax(s / T): its T^2 and the two 1 / T cancel.
    """
    z, batch = outputs.to(wide_dtype(outputs.dtype)), recording.batch
    alpha = 1.0 if batch.teacher_logits is None else loss.alpha
    counts = (batch.targets >= 0).to(z.dtype).unsqueeze(1)  # ignored rows have no loss
    if loss.temperature == 1 or alpha in (0, 1):
        shares = [(1.0, 1.0 if alpha == 1 else loss.temperature)]
    else:
        shares = [(alpha, 1.0), (1 - alpha, loss.temperature)]
    return [(counts * math.sqrt(weight), (z / temperature).softmax(1).sqrt_()) for weight, temperature in shares]


def _drawn_labels(parts: list[tuple[Tensor, Tensor]], uniform: Tensor) -> Tensor:
    """sum over the parts of sqrt(w) (p - e_y), y ~ p: [N, V]."""
    total: Tensor | None = None
    for (scale, root), draw in zip(parts, uniform.unbind(1), strict=True):
        p = root.square()
        sums = _running_sums(p)
        label = torch.searchsorted(sums, (draw * sums[:, -1]).unsqueeze(1), right=True).clamp_(max=p.shape[1] - 1)
        grad = p.mul_(scale).scatter_add_(1, label, -scale)
        total = grad if total is None else total.add_(grad)
    assert total is not None
    return total


def _running_sums(p: Tensor) -> Tensor:
    """p's sums up to every class, [N, V]. torch's are not deterministic for floats on a GPU; those of integers are."""
    if not (p.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return p.cumsum(1)
    return _running_sums_of_integers(p)


def _running_sums_of_integers(p: Tensor) -> Tensor:
    """The same to 2^-52: a row's probabilities add up to 1, so that 63 bits hold every sum."""
    return (p.double() * 2.0**52).long().cumsum(1).double().mul_(2.0**-52).to(p.dtype)


def _uniform(samples: int, each: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """[N, each] numbers in [0, 1): the next `each` of the generator for every sample."""
    numbers = torch.rand(samples, each, generator=generator, dtype=torch.float64)
    return numbers.to(device=like.device, dtype=wide_dtype(like.dtype)).clamp_(max=1 - 2**-24)  # rounding gives 1


def _dense_roots(recording: Recording, outputs: Tensor, name: str) -> Tensor:
    """R_i with R_i R_i^T = H_i for any loss: [N, D, D], by the eigenvalues of H_i; negative ones count as 0."""
    N, D = len(outputs), outputs[0].numel()
    if D > MOST_OUTPUTS:
        raise ValueError(
            f"{name}: a sample has {D} outputs, and the Hessian of this loss in them would be {D} x {D} for each; that "
            f"is done for up to {MOST_OUTPUTS}. Use fisher='empirical', or make each row of the outputs a sample"
        )
    with torch.enable_grad():
        z = outputs.to(wide_dtype(outputs.dtype)).requires_grad_()
        (grad,) = torch.autograd.grad(recording.losses_of(z).sum(), z, create_graph=True)
        if not grad.requires_grad:
            return z.new_zeros(N, D, 0)
        rows = [
            torch.autograd.grad(column.sum(), z, retain_graph=True, materialize_grads=True)[0].reshape(N, D)
            for column in grad.reshape(N, D).unbind(1)
        ]
    H = torch.stack(rows, 1)
    step = max(1, _BLOCK_ELEMENTS // (D * D))
    for block in H.split(step):
        values, vectors = torch.linalg.eigh((block + block.mT) / 2)
        torch.mul(vectors, values.clamp(min=0).sqrt().unsqueeze(1), out=block)
    return H
