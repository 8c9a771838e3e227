"""What a run has counted so far: epochs, steps, the losses of the present epoch, the labels that it has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .finite import sum_of
from .indexed import IndexedBatch, as_batch
from .step import StepResult

LOSSES = ("student_loss", "teacher_loss")


class Tally:
    """Counts that a run goes on with after it was interrupted."""

    def __init__(self) -> None:
        self.epoch = self.steps = self.teacher_epochs = 0
        self.history: list[dict[str, Any]] = []
        self.labels: Tensor | None = None  # int64 [N], -1 where none was seen yet
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def new_epoch(self) -> None:
        """Forget the losses of the last one."""
        self._sums, self._samples = {}, 0

    def add(self, result: StepResult) -> None:
        """Count a step's losses; nothing waits for a GPU."""
        for name, losses in zip(LOSSES, (result.student_losses, result.teacher_losses), strict=True):
            if losses is not None:
                total = self._sums.get(name)
                self._sums[name] = sum_of(losses) if total is None else total + sum_of(losses)
        self._samples += len(result.student_losses)

    def mean_losses(self) -> dict[str, float | None]:
        """The mean loss of either network over the samples of this epoch; None for one that was not trained."""
        return {name: float(self._sums[name]) / self._samples if name in self._sums else None for name in LOSSES}

    def note_labels(self, indexed: IndexedBatch, samples: int) -> None:
        """Remember labels of N samples, where they are classes and on the CPU: for the report."""
        targets = self._classes(as_batch(indexed.batch).targets)
        if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
            return
        if targets.device.type == "cpu" and indexed.indices.device.type == "cpu":
            if self.labels is None:
                self.labels = torch.full((samples,), -1)
            self.labels[indexed.indices] = targets.long()

    def _classes(self, targets: Any) -> Any:
        """The labels of a batch, if these targets are any."""
        return targets

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {name.removeprefix("_"): value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counts of another run."""
        for name in vars(self):
            setattr(self, name, state[name.removeprefix("_")])
