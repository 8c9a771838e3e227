"""When influence is measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._model import Loss, require_no_batch_statistics
from ..curvature import CURVATURES
from ..influence import influence_scores
from ..solvers import SOLVERS

# What the weighting says itself, or what makes no sense in training.
_OWN = {
    "model",
    "batch",
    "val",
    "loss",
    "params",
    "out",
    "resume",
    "return_solution",
    "group",
    "curvature_data",
    "queries",
}
OPTIONS = tuple(name for name in inspect.signature(influence_scores).parameters if name not in _OWN)


def check_schedule(refresh: Any) -> str | int:
    """The schedule, if it is one; ValueError otherwise."""
    if refresh in ("epoch", "step") or (isinstance(refresh, int) and not isinstance(refresh, bool) and refresh >= 1):
        return refresh
    raise ValueError(f"refresh is {refresh!r}, expected 'epoch', 'step', or a number of steps >= 1")


def check_counts(**counts: Any) -> None:
    """ValueError for a setting that is no whole number, or too small a one; None is none."""
    for name, value in counts.items():
        least = 0 if name in ("warmup_epochs", "epochs") else 1
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


def require_influence_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Options of influence_scores, by name; ValueError for others, and for unknown curvatures and solvers."""
    options = dict(options or {})
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"influence has the option {name!r}, expected some of {', '.join(OPTIONS)}")
    for name, known in (("curvature", CURVATURES), ("solver", SOLVERS)):
        if name in options and options[name] not in known:
            raise ValueError(f"influence: {name} is {options[name]!r}, expected one of {', '.join(known)}")
    return options
