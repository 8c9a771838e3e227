"""Weights that are given, not measured: an oracle's, a control's, or those of another run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from .mechanisms import Mechanism


class GivenWeights:
    """Weights that were given, read as measured ones are."""

    def __init__(self, weights: Tensor, device: torch.device) -> None:
        self.weights = weights.detach().to(device)

    def __call__(self, indices: Tensor) -> Tensor:
        """Those of these samples, [n]."""
        return self.weights[indices.to(self.weights.device)]

    def told(self) -> str:
        """By which others are told from them."""
        seen = hashlib.blake2b(self.weights.double().cpu().numpy().tobytes(), digest_size=8)
        return f"{len(self.weights)} ({seen.hexdigest()})"


def given_weights(weights: Any, mechanism: Mechanism, device: torch.device) -> GivenWeights | None:
    """They themselves, checked; None for None."""
    if weights is None:
        return None
    if not mechanism.weighs:
        raise ValueError(f"weights are given, but mechanism {mechanism.name!r} uses none")
    if not isinstance(weights, Tensor) or weights.dim() != 1 or not weights.is_floating_point():
        form = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights are {form}, expected a floating-point tensor [N]")
    if not bool(weights.isfinite().all()):
        raise ValueError(f"weights are not finite at {(~weights.isfinite()).nonzero()[:10, 0].tolist()}")
    if bool((weights < 0).any()):
        raise ValueError(f"weights are negative at {(weights < 0).nonzero()[:10, 0].tolist()}, expected numbers >= 0")
    return GivenWeights(weights, device)
