"""The table [data] of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...._config import Section, require_known
from . import digits, folders, functions, hub

KINDS: dict[str, Any] = {"digits": digits, "torchvision": folders, "datasets": hub, "function": functions}
"""Modules with KEYS, `read` (section -> options) and `load` (options, importer -> DataParts)."""

COMMON = ("kind", "batch_size", "workers", "validation", "test", "seed", "flip", "classes")


@dataclass(frozen=True)
class DataOptions:
    """What [data] says, checked."""

    section: Section
    kind: str
    batch_size: int
    workers: int
    validation: float | int | None  # a share (float) or a number (int) of training samples; None: if need be
    test: float | int | None
    seed: int
    flip: float
    classes: int | None
    own: Any  # what the adapter of this kind has read


def read_data(section: Section) -> DataOptions:
    """The table, checked for its keys, their types, and the files that it names; ConfigError names the key."""
    kind = section.choice("kind", KINDS)
    adapter = KINDS[kind]
    require_known(section.path, section.given, (*COMMON, *adapter.KEYS), "data.")
    defaults = getattr(adapter, "HELD_OUT", {})
    return DataOptions(
        section=section,
        kind=kind,
        batch_size=section.integer("batch_size", 64, least=1),
        workers=section.integer("workers", 0),
        validation=_share_or_count(section, "validation", defaults.get("validation")),
        test=_share_or_count(section, "test", defaults.get("test")),
        seed=section.integer("seed", 0),
        flip=section.number("flip", "a share in [0, 1)", 0.0, 0, 1),
        classes=section.integer("classes", None, least=2),
        own=adapter.read(section),
    )


def _share_or_count(section: Section, key: str, default: int | None) -> float | int | None:
    value = section.value(key, default)
    if key not in section or (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1):
        return value
    raise section.wrong(key, "expected a share of the training samples in (0, 1), or a whole number of them >= 1")
