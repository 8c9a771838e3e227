"""Data that a function of the user's returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...._config import ConfigError, Importer, Section, require_known
from ...runs.samples_file import SampleFacts
from .parts import DataParts

KEYS = ("function", "arguments")
_PARTS = tuple(field.name for field in fields(DataParts))


@dataclass(frozen=True)
class Options:
    """Which function, and its arguments."""

    section: Section
    function: str
    arguments: dict[str, Any]


def read(section: Section) -> Options:
    """The function's name, which is imported later."""
    section.resolved["function"] = None
    arguments = section.settings("arguments")
    function = section.text("function")
    if ":" not in function:
        raise section.wrong("function", "expected 'module:function' or 'file.py:function'")
    return Options(section, function, arguments)


def load(options: Options, importer: Importer) -> DataParts:
    """What it returns: DataParts, a mapping with the same names, or (train, validation[, test])."""
    found = importer.call("data.function", options.function, options.arguments)
    path = options.section.path
    if isinstance(found, Mapping):
        require_known(path, found, _PARTS, "data.function: ")
        if "train" not in found:
            raise ConfigError(f"{path}: data.function is {options.function!r}, which gave no 'train'")
        found = DataParts(**found)
    elif isinstance(found, tuple) and len(found) in (2, 3):
        found = DataParts(*found)
    if not isinstance(found, DataParts):
        raise ConfigError(
            f"{path}: data.function is {options.function!r}, which gave a {type(found).__name__}, expected "
            f"(train, validation[, test]), a mapping with keys of {', '.join(_PARTS)}, or DataParts"
        )
    if found.facts is not None and not isinstance(found.facts, SampleFacts):
        raise ConfigError(
            f"{path}: data.function is {options.function!r}, whose facts are a {type(found.facts).__name__}, expected "
            "kdaif_fast.distill.SampleFacts"
        )
    return found
