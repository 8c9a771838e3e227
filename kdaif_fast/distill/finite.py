"""Losses that are not finite: found before they can spoil what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

NAMED = 10
"""How many samples an error names."""


class LossNotFiniteError(RuntimeError):
    """A loss or weight was NaN or infinite; `indices` has the places of its samples in the data set."""

    def __init__(self, what: str, indices: list[int], detail: str = "") -> None:
        named = ", ".join(map(str, indices[:NAMED])) + (", ..." if len(indices) > NAMED else "")
        super().__init__(
            f"{what} is not finite for {len(indices)} sample(s) of the training data, at the indices {named}{detail}. "
            "Training has stopped; what was saved before is intact. Look at these samples, or take a smaller learning "
            "rate or clip_norm"
        )
        self.indices = indices


class FiniteWatch:
    """Looks at every sample's loss: at once on the CPU; on a GPU, where looking means waiting, every `every` steps."""

    def __init__(self, every: int = 50) -> None:
        self._every = every
        self._waiting: list[tuple[str, Tensor, Tensor]] = []

    def look(self, what: str, values: Tensor, indices: Tensor) -> None:
        """Raise LossNotFiniteError, now or later, if one of them is not finite."""
        self._waiting.append((what, values.detach(), indices))
        if values.device.type == "cpu" or len(self._waiting) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Raise now for whatever has been seen."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for what, values, indices in waiting:
            if values.device.type == "cpu" and bool(values.isfinite().all()):
                continue
            bad = indices.cpu()[~values.isfinite().cpu()]
            if len(bad):
                raise LossNotFiniteError(what, bad.tolist())


def sum_of(losses: Tensor) -> Tensor:
    """Their sum in float64 or float32, without a graph."""
    return losses.detach().sum(dtype=torch.float32 if losses.device.type == "mps" else torch.float64)
