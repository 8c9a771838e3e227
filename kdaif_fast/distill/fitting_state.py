"""Whether a state can be taken over, found out before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def require_fitting(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """ValueError if the state of one of these parts is that of a network of another form, or of its optimizer.

    Parts with a method `require_fitting(state)` are asked; of others (schedulers) nothing is looked at.
    """
    for name, part in parts.items():
        state = states[name]
        if isinstance(part, nn.Module):
            _require_same_tensors(name, part.state_dict(), state)
        elif isinstance(part, Optimizer):
            mine, its = ([len(group["params"]) for group in s["param_groups"]] for s in (part.state_dict(), state))
            if mine != its:
                raise ValueError(
                    f"the checkpoint's {name} has groups of {its} parameters, but this run's has groups of {mine}"
                )
        elif hasattr(part, "require_fitting"):
            part.require_fitting(state)


def _require_same_tensors(name: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> None:
    for missing, where in ((mine.keys() - its.keys(), "checkpoint"), (its.keys() - mine.keys(), "run")):
        if missing:
            raise ValueError(f"the {name} of the {where} lacks {', '.join(sorted(missing)[:5])}, which the other's has")
    for key, value in mine.items():
        if isinstance(value, Tensor) and value.shape != its[key].shape:
            raise ValueError(
                f"the checkpoint's {name} has {key} of shape {tuple(its[key].shape)}, but this run's "
                f"{tuple(value.shape)}"
            )
