"""Batches as the calls of influence take them: on a device, with what the teacher says of each sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._model import Batch, call_model
from .indexed import IndexedBatch, as_batch, on_device


class Taught:
    """The batches of a loader, again and again, with the teacher's logits where there is a teacher.

    Batches may be in any form that `as_batch` reads, with indices or without. The teacher is in the mode that it is in.
    Of a batch nothing is kept but its targets, until the next pass.
    """

    def __init__(self, data: Any, teacher: nn.Module | None, device: torch.device) -> None:
        self.data, self.teacher, self.device = data, teacher, device
        self.targets: list[Any] = []

    def __iter__(self) -> Iterator[Batch]:
        self.targets = []
        for given in self.data:
            batch = taught(given, self.teacher, self.device)
            self.targets.append(batch.targets)
            yield batch

    def __len__(self) -> int:
        return len(self.data)


def taught(given: Any, teacher: nn.Module | None, device: torch.device) -> Batch:
    """One batch, on the device, with the teacher's logits; those that it has are left."""
    batch = on_device(as_batch(given.batch if isinstance(given, IndexedBatch) else given), device)
    if teacher is None or batch.teacher_logits is not None:
        return batch
    return batch._replace(teacher_logits=teacher_logits(teacher, batch.inputs))


@torch.no_grad()
def teacher_logits(teacher: nn.Module, inputs: Any) -> Tensor:
    """What the teacher says, without a graph; TypeError if that is no tensor."""
    outputs = call_model(teacher, inputs, "batch", updates_buffers=True)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"teacher returned a {type(outputs).__name__}, expected a tensor or something with logits")
    return outputs
