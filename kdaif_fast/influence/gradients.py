"""Gradients as rows of a matrix over the flat parameters, from one recorded pass over a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._data import Batches
from .._model import (
    Batch,
    Loss,
    Params,
    plain_model,
    random_states,
    require_independent_samples,
    run_model,
    select_parameters,
)
from .._tree import product_dtype, wide_dtype
from ..per_sample.directions import read_directions
from ..per_sample.dots import Dots
from ..per_sample.groups import Group, blocks, visit_groups
from ..per_sample.paths import Path
from ..per_sample.recording import Recording
from ..per_sample.terms import Term
from ..per_sample.terms.base import BLOCK_ELEMENTS
from .loaders import require_order


def read_data(
    model: nn.Module, params: Params | None, *, any_order: tuple[str, ...] = (), **data: Any
) -> tuple[list[str], list[Batches]]:
    """The names of the chosen parameters, and the data as batches, which a loader gives on the parameters' device.

    Raises ValueError for a loader that shuffles, unless its name is in `any_order`: scores come in the samples' order.
    """
    parameters = select_parameters(plain_model(model), params)
    device = next(iter(parameters.values())).device
    for name, value in data.items():
        if name not in any_order:
            require_order(value, name)
    return list(parameters), [
        Batches(value, name, device, in_order=name not in any_order) for name, value in data.items()
    ]


def record(model: nn.Module, batch: Batch, loss: Loss | None, params: Params | None, label: str) -> Recording:
    """A recorded pass for influence: samples that are independent, no random outputs, finite losses, real parameters.

    Raises TypeError, ValueError: else, or if the arguments do not fit together; `label` is what errors call the batch.
    """
    plain = plain_model(model)
    require_independent_samples(plain)
    before = random_states(plain)
    recording = Recording(plain, batch, loss, params, name=label)
    if any(not torch.equal(a, b) for a, b in zip(before, random_states(plain), strict=True)):
        with torch.no_grad():
            run_model(plain, batch.inputs, label)  # raises if the draws have been used
    for name, parameter in recording.parameters.items():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, expected real parameters; choose them by params"
            )
    require_finite_rows(recording.losses, label, "loss")
    return recording


def require_finite_rows(rows: Tensor, label: str, what: str = "gradient", first: int = 0) -> None:
    """Raise ValueError at the first sample with a row [N, ...] that is not finite; `first`: the first row's sample."""
    finite = rows.isfinite().reshape(len(rows), -1).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(f"{label}: sample {first + index} has a {what} that is not finite")


def columns(parameters: dict[str, Tensor]) -> dict[str, slice]:
    """Where each parameter is in a flat vector [P]."""
    where, start = {}, 0
    for name, parameter in parameters.items():
        where[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return where


def gradient_dots(recording: Recording, vectors: Tensor, label: str) -> Tensor:
    """<grad l_i, v_k> for every sample and every row of [K, P]: [N, K]. Raises ValueError where it is not finite."""
    dots = Dots(recording, read_directions(vectors, recording.parameters)[0])
    recording.visit(dots.take)
    total = dots.total()
    require_finite_rows(total, label)
    return total


def squared_norms(recording: Recording) -> dict[str, Tensor]:
    """|g_il|^2 for every parameter that takes part: [N]."""
    squares: dict[str, Tensor] = {}

    def receive(group: Group) -> None:
        term = group.single()
        if term is not None:
            squares[next(iter(group.names))] = term.squared_norms()
            return
        pieces = [
            {name: flat_rows(grads).square().sum(1) for name, grads in group.grads(start, stop).items()}
            for start, stop in blocks(group, recording.samples)
        ]
        squares.update({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})

    visit_groups(recording, receive)
    return squares


def flat_rows(grads: Tensor) -> Tensor:
    """[n, *shape] -> [n, elements], in float32 at least."""
    return grads.reshape(len(grads), -1).to(wide_dtype(grads.dtype))


def formed(path: Path, term: Term) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """A term's gradients for some samples at a time: (start, stop, {name: [stop - start, *shape]})."""
    step = max(1, BLOCK_ELEMENTS // max(1, term.shape.numel()))
    for start in range(0, term.samples, step):
        stop = min(start + step, term.samples)
        yield start, stop, path.pull(term.block(start, stop).grads())


def sample_gradients(recording: Recording) -> Tensor:
    """Every sample's gradient, flat: [N, P], in float32 at least. Formed in blocks of one layer, beside the result."""
    where = columns(recording.parameters)
    rows = _zeros(recording, recording.samples)

    def receive(terms: list[tuple[Path, Term]]) -> None:
        for path, term in terms:
            for start, stop, grads in formed(path, term):
                for name, pulled in grads.items():
                    rows[start:stop, where[name]] += flat_rows(pulled)

    recording.visit(receive)
    return rows


class KeptGradients:
    """The terms of a recorded pass, kept: gradients of any of its samples, flat, are formed when asked for.

    Memory: the inputs and the output gradients of all layers for the batch.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._where = columns(recording.parameters)
        self._terms: list[tuple[Path, Term]] = []
        recording.visit(self._terms.extend)

    def rows(self, start: int, stop: int) -> Tensor:
        """Gradients of the samples from start to stop: [stop - start, P]."""
        rows = _zeros(self._recording, stop - start)
        with torch.no_grad():
            for path, term in self._terms:
                for first, last, grads in formed(path, term.block(start, stop)):
                    for name, pulled in grads.items():
                        rows[first:last, self._where[name]] += flat_rows(pulled)
        return rows


def weighted_gradients(recording: Recording, weights: Tensor) -> Tensor:
    """sum_i w_ki grad l_i for K sets of weights: [K, N] -> [K, P], in float32 at least. Forms none by itself."""
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
