"""Damping, as the scores without an iterative solve take it."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def check_damping(damping: Any) -> None:
    """Raise TypeError, ValueError unless it is a finite number >= 0 or "auto"."""
    if isinstance(damping, str) and damping == "auto":
        return
    if isinstance(damping, bool) or not isinstance(damping, Real):
        raise TypeError(f"damping is {damping!r}, expected a number or 'auto'")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is {damping!r}, expected a finite number >= 0 or 'auto'")
