"""tol="rank": the solve ends when the ranking of the samples has settled, which is long before the residual is small.

The scores of a fixed sample of the training data are taken from the current solution every few iterations and compared
with those of the look before. Where convergence is slow, neighbouring iterates are alike whether they are right or not:
so looks move apart as the solve goes on, each at least a tenth later than the last.

Measured by `python benchmarks/rank_tolerance.py` on digits (1,200 training and 200 validation images, a tenth of the
labels flipped), Gauss-Newton, one solve for the mean validation loss: where it stopped, the Spearman correlation of all
1,200 scores with those of a residual of 1e-5, and the iterations that solves to a fixed residual take.

    model  epochs  damping        iterations  residual  Spearman  for 1e-2  for 1e-3  for 1e-5
    mlp    1       auto, 5.1e-05         130     4e-02    0.9984       170       279       470
    mlp    1       1e-01                  15     2e-05    1.0000         9        11        17
    mlp    1       1e-02                  25     2e-03    1.0000        18        27        42
    mlp    1       1e-03                  35     4e-02    0.9992        47        70       117
    mlp    4       auto, 3.4e-04         160     8e-03    0.9993       160       231       410
    mlp    4       1e-01                  20     1e-03    1.0000        14        19        32
    mlp    4       1e-02                  30     2e-02    0.9992        33        52        82
    mlp    4       1e-03                 100     8e-03    0.9995        93       146       248
    mlp    15      auto, 2.1e-04         180     1e-02    0.9995       174       277       456
    mlp    15      1e-01                  20     1e-04    1.0000        14        17        27
    mlp    15      1e-02                  30     1e-02    0.9996        30        41        71
    mlp    15      1e-03                  90     2e-02    0.9998        84       124       213
    mlp    60      auto, 3.1e-04         200     2e-02    0.9994       196       290       477
    mlp    60      1e-01                  25     9e-05    1.0000        15        20        32
    mlp    60      1e-02                  40     7e-03    0.9996        38        57        89
    mlp    60      1e-03                 130     3e-03    0.9999       111       162       269
    cnn    1       auto, 8.0e-05          40     1e-01    0.9992        57        82       138
    cnn    1       1e-01                   9     6e-05    1.0000         5         7        10
    cnn    1       1e-02                  16     3e-05    1.0000        10        13        18
    cnn    1       1e-03                  25     5e-03    1.0000        23        29        48
    cnn    4       auto, 2.5e-03          45     3e-02    0.9983        64        99       170
    cnn    4       1e-01                  20     3e-03    1.0000        15        22        33
    cnn    4       1e-02                  30     2e-02    0.9995        33        53        90
    cnn    4       1e-03                  80     5e-02    0.9992        86       144       254
    cnn    15      auto, 4.7e-03          60     5e-02    0.9988        70       106       174
    cnn    15      1e-01                  25     1e-03    1.0000        19        28        46
    cnn    15      1e-02                  45     3e-02    0.9994        51        71       123
    cnn    15      1e-03                 130     1e-02    0.9992       134       217       370
    cnn    60      auto, 4.5e-03          80     2e-02    0.9993        70       103       191
    cnn    60      1e-01                  25     2e-03    1.0000        19        29        46
    cnn    60      1e-02                  60     3e-03    0.9997        47        77       129
    cnn    60      1e-03                 145     1e-02    0.9984       136       219       391

Together 2,065 iterations, against 2,045 for 1e-2, 3,122 for the default 1e-3 and 5,283 for 1e-5. What it
saves is the knowledge of which residual is enough, another one in every row; where the damping is so large that 1e-3
takes some twenty iterations, it saves nothing. Threshold and growth of the looks were chosen on these images and
networks: on other problems, compare once with a small `tol`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .._data import Batches, size_of
from .._distributed import Group, agree, together
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
        with together(self._group, x.device):
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
