"""Weights by class and by group: who is weighted down, and is it more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ERRORS = 3.0
"""A marked group's mean is so many standard errors below the overall mean: chance does that once in 700 groups."""

SHARE = 0.05
"""... and lower by this share of it, because with many samples differences that mean nothing are many errors wide."""

FEWEST = 10
"""... and the group has so many samples, since its standard error is measured on them."""


@dataclass(frozen=True)
class GroupWeights:
    """The weights of one class or group."""

    name: str
    count: int
    mean: float
    share_below_1: float
    errors: float | None  # (mean - overall mean) / its standard error; None where that is unknown
    is_weighted_down: bool
    flipped: float | None = None  # share of its labels that are known to be wrong
    clean_below_1: float | None = None  # share below 1 of its samples with right labels


def group_weights(
    weights: Tensor, places: Tensor, name: Callable[[int], str], flipped: Tensor | None = None
) -> list[GroupWeights]:
    """The weights of each group, lowest mean first.

    The difference of a group's mean to the overall mean is (1 - n / N) times its difference to the mean of all others,
    and so is its standard error: their ratio is that of Welch's test of the group against the others.

    Args:
        weights: [N]; samples whose weight is not finite are left out.
        places: int [N], the group of each sample.
        name: of a group.
        flipped: bool [N], where known.

    Example:
        >>> import torch
        >>> rows = group_weights(torch.tensor([1.0, 1.2, 0.4, 0.6]), torch.tensor([0, 0, 1, 1]), "ab".__getitem__)
        >>> [(row.name, row.mean, row.is_weighted_down) for row in rows]
        [('b', 0.5, False), ('a', 1.1, False)]
    """
    kept = weights.isfinite()
    weights, places = weights[kept].double(), places[kept]
    flipped = None if flipped is None else flipped[kept]
    rows = []
    for place in places.unique().tolist():
        inside = places == place
        mine, others = weights[inside], weights[~inside]
        mean, overall = float(mine.mean()), float(weights.mean())
        errors = _errors(mine, others)
        low = errors is not None and errors <= -ERRORS and mean <= (1 - SHARE) * overall and len(mine) >= FEWEST
        clean = None if flipped is None else mine[~flipped[inside]]
        rows.append(
            GroupWeights(
                name(place),
                len(mine),
                round(mean, 6),
                float((mine < 1).double().mean()),
                errors,
                low,
                None if flipped is None else float(flipped[inside].double().mean()),
                None if clean is None or not len(clean) else float((clean < 1).double().mean()),
            )
        )
    return sorted(rows, key=lambda row: (row.mean, row.name))


def _errors(mine: Tensor, others: Tensor) -> float | None:
    """How many standard errors apart the means are; None where there are too few samples for a variance."""
    if len(mine) < 2 or len(others) < 2:
        return None
    difference = float(mine.mean() - others.mean())
    error = math.sqrt(float(mine.var()) / len(mine) + float(others.var()) / len(others))
    if error == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / error
