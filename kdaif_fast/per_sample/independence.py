"""A check, on request, that a model treats each sample of a batch by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._model import call_model, plain_model, transparent, unpack_batch


def require_independence(model: nn.Module, batch: Any, name: str = "batch") -> None:
    """Raise ValueError if a sample's outputs change when the batch is cut: then samples are mixed.

    Runs the model twice more, on the batch and on its first half, with dropout off.
    """
    model = plain_model(model)
    inputs = unpack_batch(batch, name).inputs
    # By name: else all GPUs of the machine are asked, and with several of them torch warns.
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.no_grad(), transparent(model), _without_dropout(model), torch.random.fork_rng(devices):
        whole = call_model(model, inputs, name)
        if not isinstance(whole, Tensor) or whole.dim() == 0 or len(whole) < 2:
            return
        samples = len(whole)
        half = (samples + 1) // 2

        def cut(x: Any) -> Any:
            return x[:half] if isinstance(x, Tensor) and x.dim() and len(x) == samples else x

        part = call_model(model, tree_map(cut, inputs), name)
    if not isinstance(part, Tensor) or part.shape != whole[:half].shape:
        raise ValueError(f"the model's outputs on half of {name} have another shape than the half of its outputs")
    size = float(whole.abs().max())
    tolerance = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(part, whole[:half], rtol=tolerance, atol=tolerance * size, equal_nan=True):
        worst = int((part - whole[:half]).abs().reshape(half, -1).amax(1).argmax())
        raise ValueError(
            f"the model mixes the samples of {name}: its outputs for sample {worst} change when other samples are left "
            "out, so that no sample has a gradient of its own"
        )


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
