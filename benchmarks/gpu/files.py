"""Files that are whole at every moment: written beside, then renamed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """In one step, for whoever reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    """As write; numbers that JSON does not know (NaN, infinity) become null."""
    write(path, json.dumps(_finite(content), indent=1, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def read_json(path: Path) -> Any:
    """The content; None where there is no such file, or it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
