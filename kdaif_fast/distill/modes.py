"""Networks in training and in evaluation mode, and what other libraries wrap around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Layers that compute the same in both modes; of anything else that is not known.
_SAME_IN_BOTH_MODES = (
    *(nn.Linear, nn.Bilinear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Embedding),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Hardswish),
)


@contextlib.contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Within it the models are in evaluation mode; afterwards each of their modules is in the mode that it was in."""
    changed = [module for model in models if model is not None for module in model.modules() if module.training]
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module in changed:
            module.training = True


def training(model: nn.Module) -> None:
    """Put a model that is in evaluation mode as a whole into training mode; parts that are in it alone stay there."""
    if not model.training:
        model.train()


def is_same_in_both_modes(model: nn.Module) -> bool:
    """Whether the model certainly computes the same in both modes: plain layers, one after another."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Sequential)]
    return all(type(module) in _SAME_IN_BOTH_MODES for module in modules)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without torch.compile and DistributedDataParallel around it."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_spread(model: nn.Module) -> bool:
    """Whether several processes train the model together."""
    return any(isinstance(part, DistributedDataParallel) and part.process_group.size() > 1 for part in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def require_separate(teacher: nn.Module, student: nn.Module) -> None:
    """ValueError if the two have a parameter in common that is trained: each would train a part of the other."""
    own = {id(p) for p in teacher.parameters() if p.requires_grad}
    shared = [name for name, p in unwrapped(student).named_parameters() if id(p) in own]
    if shared:
        raise ValueError(
            f"teacher and student have parameters in common: the student's {', '.join(shared[:5])}; expected networks "
            "of their own (copy.deepcopy), or common parts without gradient (requires_grad_(False))"
        )
