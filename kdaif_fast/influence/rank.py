"""tol="rank": the solve ends when the ranking of the samples has settled, which is long before the residual is small.

The scores of a fixed sample of the training data are taken from the current solution every few iterations and compared
with those of the look before. Where convergence is slow, neighbouring iterates are alike whether they are right or not:
so looks move apart as the solve goes on, each at least a tenth later than the last.

Measured by `python benchmarks/rank_tolerance.py` on digits (1,200 training and 200 validation images, a tenth of the labels
flipped), Gauss-Newton, one solve for the mean validation loss: where it stopped, the Spearman correlation of all 1,200
scores with those of a residual of 1e-5, and the iterations that solves to a fixed residual take.

@@TABLE@@

It costs about what a tolerance of 1e-2 does and two thirds of the default 1e-3, and needs no knowledge of which residual is
enough. Threshold and looks were chosen on 68 such solves, with single validation images as queries, dampings from 1e-4 to
0.1 and another network with convolutions among them: the lowest correlation was 0.9978; with looks at every fifth
iteration to the end it was 0.9894, and with a threshold of 0.99 instead of 0.995 it was 0.9929.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .._data import Batches, size_of
from .._distributed import Group, agree
from .._model import Batch, Loss, Params
from .._objective import Objective

SAMPLE = 512
"""How many samples are looked at; the error of a rank correlation of that many is small against what is asked for."""

PIECES = 8
"""How many batches of a loader they come from, evenly spread: a data set may be in the order of its classes."""

LOOKS_EVERY = 5
"""Iterations between looks at first."""

LOOKS_GROW = 1.1
"""By which factor the iterations until the next look grow."""

SETTLED = 0.995
"""Spearman correlation with the look before from which on the ranking counts as settled, if it is so twice in a row."""

RANK_TOLERANCE = 1e-4
"""The relative residual that ends the solve in any case."""


class RankSettled:
    """Whether the ranking has settled; called with the current solutions [K, P], every `LOOKS_EVERY` iterations.

    Every query has a ranking of its own; all have to settle, on every rank of the group.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], group: Group = None) -> None:
        self._score, self._group = score, group
        self._before: Tensor | None = None
        self._iterations, self._next, self._settled = 0, 0, 0

    def __call__(self, x: Tensor) -> bool:
        """Look, if it is time to."""
        self._iterations += LOOKS_EVERY
        if self._iterations < self._next:
            return False
        self._next = int(self._iterations * LOOKS_GROW) + 1
        ranks, before = ranks_of(self._score(x.reshape(-1, x.shape[-1]))), self._before
        self._before = ranks
        if before is None:
            return False
        is_settled = bool((spearman(ranks, before) >= SETTLED).all())
        self._settled = self._settled + 1 if agree(is_settled, self._group, ranks.device) else 0
        return self._settled == 2


def ranks_of(scores: Tensor) -> Tensor:
    """The rank of every sample, [N, K] -> [N, K], from 0; ties in the order they have."""
    return scores.argsort(dim=0, stable=True).argsort(0).double()


def spearman(ranks: Tensor, others: Tensor) -> Tensor:
    """Correlations [K] of ranks [N, K] without ties: 1 - 6 sum d^2 / (N (N^2 - 1)); 1 for a single sample."""
    N = len(ranks)
    return 1 - 6 * (ranks - others).square().sum(0) / max(1, N * (N**2 - 1))


def sample_scores(model: nn.Module, batches: Batches, loss: Loss | None, params: Params) -> Callable[[Tensor], Tensor]:
    """A function that takes directions [K, P] to scores [n, K] of the sample, by linearisations that it keeps.

    Memory: the graphs of a forward and a backward pass over 512 samples.
    """
    kept = [Objective(model, batch, loss, params, label) for label, batch in _sample(batches)]
    return lambda directions: torch.cat([objective.dots(directions) for objective in kept])


def _sample(batches: Batches) -> Iterator[tuple[str, Batch]]:
    """Some samples of some of the batches, always the same ones."""
    if batches.samples is None:
        for _ in batches:  # how many there are, without the model
            pass
    count = batches.batches
    assert count is not None
    pieces = min(PIECES, count)
    chosen = {round((i + 0.5) * count / pieces - 0.5) for i in range(pieces)}
    for number, (label, batch) in enumerate(batches):
        if number in chosen:
            yield label, some_samples(batch, -(-SAMPLE // len(chosen)))


def some_samples(batch: Batch, most: int) -> Batch:
    """At most so many of its samples, evenly spread; all of them if some of its tensors are not by sample."""
    N = size_of(batch)
    if most >= N or any(not x.dim() or len(x) != N for x in tree_leaves(tuple(batch)) if isinstance(x, Tensor)):
        return batch
    index = torch.linspace(0, N - 1, most).round().long()
    return Batch(*tree_map(lambda x: x[index.to(x.device)] if isinstance(x, Tensor) else x, tuple(batch)))
