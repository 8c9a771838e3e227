"""When influence is measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._model import Loss, require_no_batch_statistics


def check_schedule(refresh: Any) -> str | int:
    """The schedule, if it is one; ValueError otherwise."""
    if refresh in ("epoch", "step") or (isinstance(refresh, int) and not isinstance(refresh, bool) and refresh >= 1):
        return refresh
    raise ValueError(f"refresh is {refresh!r}, expected 'epoch', 'step', or a number of steps >= 1")


def check_counts(**counts: Any) -> None:
    """ValueError for a setting that is no whole number, or too small a one; None is none."""
    for name, value in counts.items():
        least = 0 if name == "warmup_epochs" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} is {value!r}, expected a whole number >= {least}")


def require_one_pass(model: nn.Module, loss: Loss | None) -> None:
    """ValueError if weights cannot be put into the gradients of one pass, as refresh="step" does."""
    if hasattr(loss, "weighted"):
        raise ValueError(
            f"refresh is 'step', which weighs a sample's whole loss, but {type(loss).__name__} weighs "
            "its terms by itself; expected refresh='epoch' or a number of steps"
        )
    try:
        require_no_batch_statistics(model)
    except ValueError as error:
        raise ValueError(
            f"refresh is 'step', but {error}, or take refresh='epoch', which measures in eval mode"
        ) from error
