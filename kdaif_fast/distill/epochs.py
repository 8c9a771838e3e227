"""Entering epochs: what loaders have to be told, and how each can be gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .runs.replay import EpochReplay


def replays_of(**loaders: Any) -> dict[str, EpochReplay]:
    """How to go on with each loader; a single batch has nothing to go on with."""
    return {
        name: EpochReplay(loader)
        for name, loader in loaders.items()
        if loader is not None and not isinstance(loader, (tuple, Mapping))
    }


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers that shuffle by epoch, as DistributedSampler does."""
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        tell: Callable[[int], Any] | None = getattr(sampler, "set_epoch", None)
        if tell is not None:
            tell(epoch)
