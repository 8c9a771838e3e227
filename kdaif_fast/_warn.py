"""Warnings that point at the user's line, whatever depth of this package they come from."""

from __future__ import annotations

import sys
import warnings


def warn_user(message: str, category: type[Warning]) -> None:
    """warnings.warn, attributed to the first frame outside of this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "").split(".")[0]
        if name == "kdaif_fast":
            level += 1
        elif name not in ("importlib", "_frozen_importlib", "_frozen_importlib_external"):
            break
        # Frames of the import machinery are not counted: warnings.warn skips them by itself.
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=level)
