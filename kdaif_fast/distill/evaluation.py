"""How good networks are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._model import call_model
from .measured_data import validation_data
from .modes import device_of, evaluating, unwrapped
from .taught import Taught


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> float | None:
    """Share of the samples whose largest output is their label; None where outputs and labels are no classes."""
    model = unwrapped(model)
    right: Tensor | int = 0
    count = 0
    with evaluating(model):
        for batch in Taught(validation_data(data), None, device_of(model)):
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
