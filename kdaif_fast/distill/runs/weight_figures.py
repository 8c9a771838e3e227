"""What an epoch's record says of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def weight_figures(weights: Tensor, flipped: Tensor | None = None) -> dict[str, Any]:
    """Mean, share below 1, quantiles and histogram of weights [N], and how they stand to flipped labels where known.

    Args:
        weights: [N], floating point.
        flipped: bool [N]: which samples' labels are known to be wrong.

    Returns:
        "mean_weight", "share_below_1"; "weight_quantiles": {"all"} and, with flips, "clean" and "flipped", those of
        QUANTILES; "weight_histogram": the same with counts of the weights from each of its "edges" to the next. If
        there are samples of both kinds also "flip_auc" (the chance that a flipped sample has a lower weight than a
        clean one, ties counted half), "flipped_below_1" and "clean_below_1" (shares). All are numbers of Python.

    Raises:
        ValueError: weights that are not [N] or none, or flips that are not bool [N].

    Example:
        >>> import torch
        >>> figures = weight_figures(torch.tensor([0.2, 0.9, 1.1, 1.2]), torch.tensor([True, False, False, False]))
        >>> figures["share_below_1"], figures["flip_auc"]
        (0.5, 1.0)
    """
    if weights.dim() != 1 or len(weights) == 0:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected [N] with N > 0")
    weights = weights.detach().double().cpu()
    # The ends are the usual range (0, 2), or whatever contains all weights.
    finite = weights[weights.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    edges = torch.linspace(min(0.0, low), max(2.0, high), BINS + 1, dtype=torch.float64)
    figures: dict[str, Any] = {
        "mean_weight": float(weights.mean()),
        "share_below_1": share_below_1(weights),
        "weight_quantiles": {"all": _quantiles(weights)},
        "weight_histogram": {"edges": edges.tolist(), "all": _counts(finite, edges)},
    }
    if flipped is None:
        return figures
    if flipped.dtype != torch.bool or flipped.shape != weights.shape:
        raise ValueError(f"flipped is {flipped.dtype} {tuple(flipped.shape)}, expected bool {tuple(weights.shape)}")
    flipped = flipped.cpu()
    for name, group in (("clean", ~flipped), ("flipped", flipped)):
        figures["weight_histogram"][name] = _counts(weights[group & weights.isfinite()], edges)
        if group.any():
            figures["weight_quantiles"][name] = _quantiles(weights[group])
    if flipped.any() and not flipped.all():
        figures["flip_auc"] = chance_of_less(weights[flipped], weights[~flipped])
        figures["flipped_below_1"] = share_below_1(weights[flipped])
        figures["clean_below_1"] = share_below_1(weights[~flipped])
    return figures


def share_below_1(weights: Tensor) -> float:
    """The share of weights < 1: of samples found harmful; NaN of none."""
    return float((weights < 1).double().mean())


def chance_of_less(first: Tensor, second: Tensor) -> float:
    """The chance that a value of `first` is less than one of `second`, ties counted half: the area under the ROC."""
    ordered = first.sort().values
    less = torch.searchsorted(ordered, second, right=False)
    equal = torch.searchsorted(ordered, second, right=True) - less
    return float((less + equal / 2).double().mean()) / len(first)


def _quantiles(weights: Tensor) -> list[float]:
    # torch.quantile stops at 16 million values.
    ordered = weights.sort().values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in QUANTILES]


def _counts(weights: Tensor, edges: Tensor) -> list[int]:
    counts = torch.histogram(weights, edges).hist
    return [int(count) for count in counts.tolist()]
