"""How good networks are, and what weights look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._model import call_model
from .modes import device_of, evaluating, unwrapped
from .taught import Taught

BINS = 40


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> float | None:
    """Share of the samples whose largest output is their label; None where outputs and labels are no classes."""
    model = unwrapped(model)
    right: Tensor | int = 0
    count = 0
    with evaluating(model):
        for batch in Taught(data, None, device_of(model)):
            outputs = call_model(model, batch.inputs, "a batch for evaluation", updates_buffers=True)
            labels = batch.targets
            if not _are_classes(outputs, labels):
                return None
            right = right + (outputs.argmax(1) == labels).sum()
            count += len(labels)
    return float(right) / count if count else None


def _are_classes(outputs: Any, labels: Any) -> bool:
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return False
    return outputs.dim() == 2 and labels.shape == outputs.shape[:1] and not labels.is_floating_point()


def describe_weights(weights: Tensor, flipped: Tensor | None = None) -> dict[str, Any]:
    """Mean weight, share below 1, histogram; with the flips known, how well low weights find them.

    Args:
        weights: [N].
        flipped: bool [N], which labels are wrong.
    """
    weights = weights.detach().cpu().double()
    found: dict[str, Any] = {
        "mean_weight": float(weights.mean()) if len(weights) else 1.0,
        "share_below_1": share_below_1(weights),
    }
    top = max(2.0, float(weights.max())) if len(weights) else 2.0
    edges = torch.linspace(min(0.0, float(weights.min())) if len(weights) else 0.0, top, BINS + 1, dtype=torch.float64)

    def counts(part: Tensor) -> list[int]:
        return [int(n) for n in torch.histogram(part, edges).hist]

    histogram: dict[str, Any] = {"edges": edges.tolist(), "all": counts(weights)}
    if flipped is not None:
        flipped = torch.as_tensor(flipped, dtype=torch.bool).cpu()
        found["flipped_below_1"], found["clean_below_1"] = map(share_below_1, (weights[flipped], weights[~flipped]))
        found["flip_auc"] = area_under_roc(-weights, flipped)
        histogram |= {"clean": counts(weights[~flipped]), "flipped": counts(weights[flipped])}
    return {**found, "weight_histogram": histogram}


def share_below_1(weights: Tensor) -> float:
    """The share of weights < 1: of samples found harmful. NaN of none."""
    return float((weights < 1).double().mean())


def area_under_roc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive has the higher score of a pair, ties counting half; NaN if there is no pair."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
