"""Settings in words that are the same in another process: what a checkpoint is compared by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch.optim import Optimizer


def told(part: Any) -> str | None:
    """Functions and classes by name, data classes with their values."""
    if part is None:
        return None
    # Without addresses, which functions among the values have.
    return (
        re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))
        if is_dataclass(part)
        else getattr(part, "__qualname__", type(part).__qualname__)
    )


def optimizer_told(optimizer: Optimizer | None) -> str | None:
    """An optimizer by name, with the settings that it began with."""
    if optimizer is None:
        return None
    plain = {name: value for name, value in optimizer.defaults.items() if isinstance(value, (int, float, tuple, str))}
    return f"{type(optimizer).__name__}({', '.join(f'{name}={plain[name]}' for name in sorted(plain))})"


def options_told(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options by name: numbers and words as they are, anything else by its type."""
    return {
        name: value if value is None or isinstance(value, (bool, int, float, str)) else told(value)
        for name, value in sorted((options or {}).items())
    }
