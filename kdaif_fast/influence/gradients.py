"""Gradients as rows of a matrix over the flat parameters, from one recorded pass over a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._model import Loss, Params, plain_model, require_independent_samples
from .._tree import product_dtype
from ..per_sample.paths import Path
from ..per_sample.recording import Recording
from ..per_sample.terms import Term
from ..per_sample.terms.base import BLOCK_ELEMENTS


def record(model: nn.Module, batch: Any, loss: Loss | None, params: Params | None, label: str) -> Recording:
    """A recorded pass for influence: samples that are independent, losses that are finite, parameters that are real.

    Raises TypeError, ValueError: else, or if the arguments do not fit together; `label` is what errors call the batch.
    """
    require_independent_samples(plain_model(model))
    recording = Recording(model, batch, loss, params, name=label)
    for name, parameter in recording.parameters.items():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, expected real parameters; choose them by params"
            )
    require_finite_rows(recording.losses, label, "loss")
    return recording


def require_finite_rows(rows: Tensor, label: str, what: str = "gradient") -> None:
    """Raise ValueError at the first sample with a row [N, ...] that is not finite. Looks at the values."""
    finite = rows.isfinite().reshape(len(rows), -1).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(f"{label}: sample {index} has a {what} that is not finite")


def columns(parameters: dict[str, Tensor]) -> dict[str, slice]:
    """Where each parameter is in a flat vector [P]."""
    where, start = {}, 0
    for name, parameter in parameters.items():
        where[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return where


def sample_gradients(recording: Recording) -> Tensor:
    """Every sample's gradient, flat: [N, P], in float32 at least. Formed in blocks of one layer, beside the result."""
    N, where = recording.samples, columns(recording.parameters)
    rows = _zeros(recording, N)

    def receive(terms: list[tuple[Path, Term]]) -> None:
        for path, term in terms:
            step = max(1, BLOCK_ELEMENTS // max(1, term.shape.numel()))
            for start in range(0, N, step):
                stop = min(start + step, N)
                for name, pulled in path.pull(term.block(start, stop).grads()).items():
                    rows[start:stop, where[name]] += pulled.reshape(stop - start, -1)

    recording.visit(receive)
    return rows


def weighted_gradients(recording: Recording, weights: Tensor) -> Tensor:
    """sum_i w_ki grad l_i for K sets of weights: [K, N] -> [K, P], in float32 at least. No sample's gradient is formed."""
    where = columns(recording.parameters)
    rows = _zeros(recording, len(weights))

    def receive(terms: list[tuple[Path, Term]]) -> None:
        for path, term in terms:
            for k, some in enumerate(weights):
                grad = term.weighted(some)
                grad = grad.to_dense() if grad.is_sparse else grad
                for name, pulled in path.pull(grad.unsqueeze(0)).items():
                    rows[k, where[name]] += pulled.reshape(-1)

    recording.visit(receive)
    return rows


def _zeros(recording: Recording, count: int) -> Tensor:
    parameters = recording.parameters.values()
    size = sum(parameter.numel() for parameter in parameters)
    return torch.zeros(count, size, dtype=product_dtype(parameters), device=recording.losses.device)
