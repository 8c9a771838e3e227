"""Scores of one batch after the other, once the directions are known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._data import Batches, size_of
from .._model import Loss, Params
from ..per_sample.directions import read_directions
from ..per_sample.dots import Dots
from ..per_sample.paths import Path
from ..per_sample.recording import Recording
from ..per_sample.terms import Term
from .gradients import record, require_finite_rows
from .progress import track

DIRECTIONS_AT_ONCE = 64
"""Directions that layers are asked about together; what one costs hardly falls beyond that, and memory grows."""


def stream_scores(
    model: nn.Module,
    batches: Batches,
    directions: Tensor,
    *,
    loss: Loss | None,
    params: Params | None,
    start: int = 0,
    progress: bool | None = False,
) -> Iterator[Tensor]:
    """phi = -<grad l_i, s_k> of the samples from number `start` on: [K, P] -> [N of a batch, K], batch by batch.

    One forward and one backward pass a batch, whatever K is. Measured in one thread on benchmarks/persample_models.py,
    against a linearisation of each batch that the directions are pushed through: 0.6 (MLP) to 0.5 (convolutions) of
    its time for K = 1, 0.55 to 0.1 for K = 8.

    Raises ValueError for a loss or a score that is not finite, naming the batch.

    Memory: that of a training step, and the directions.
    """
    position = 0
    for label, batch in track(batches, f"scores of {batches.name}", progress):
        size = size_of(batch)
        if position + size <= start:  # scored by a run before this one
            position += size
            continue
        phi = -dots(record(model, batch, loss, params, label), directions)
        require_finite_rows(phi, label, "score")
        yield phi[max(0, start - position) :]
        position += len(phi)


def dots(recording: Recording, directions: Tensor) -> Tensor:
    """<grad l_i, v_k> for every sample and direction, [K, P] -> [N, K], some directions at a time."""
    parts = [
        Dots(recording, read_directions(rows, recording.parameters)[0]) for rows in directions.split(DIRECTIONS_AT_ONCE)
    ]

    def receive(terms: list[tuple[Path, Term]]) -> None:
        for part in parts:
            part.take(terms)

    recording.visit(receive)
    return torch.cat([part.total() for part in parts], 1)
