"""Which columns of a table are inputs, labels and groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...._config import ConfigError, Section, meant
from ...indexed import LABELS

COLUMNS = ("text", "image", "features", "label", "group")


@dataclass(frozen=True)
class Columns:
    """Names of columns; of text, image and features one is there."""

    label: str
    text: tuple[str, ...] = ()
    image: str | None = None
    features: tuple[str, ...] = ()
    group: str | None = None


def choose_columns(section: Section, given: Mapping[str, Any], dataset: Any) -> Columns:
    """The columns that the file names, else the only ones that they can be.

    Raises:
        ConfigError: a name that the data set does not have; several that could be meant.
    """
    features = dataset.features
    for key, names in given.items():
        for name in [names] if isinstance(names, str) else names or ():
            if name not in features:
                raise ConfigError(
                    f"{section.path}: data.columns.{key} is {name!r}, expected one of {', '.join(features)}"
                    f"{meant(name, features)}"
                )
    label = given.get("label") or _the_label(section, features)
    group = given.get("group")
    if any(given.get(key) for key in ("text", "image", "features")):
        return Columns(
            label, tuple(given.get("text") or ()), given.get("image"), tuple(given.get("features") or ()), group
        )
    others = {name: feature for name, feature in features.items() if name not in (label, group)}
    images = [name for name, feature in others.items() if type(feature).__name__ == "Image"]
    texts = [name for name, feature in others.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
    if len(images) == 1:
        return Columns(label, image=images[0], group=group)
    if not images and len(texts) == 1:
        return Columns(label, text=(texts[0],), group=group)
    raise ConfigError(
        f"{section.path}: the key 'data.columns' is missing: expected text, image or features to say which of the "
        f"columns {', '.join(others)} are inputs"
    )


def class_names(section: Section, columns: Columns, dataset: Any) -> list[str] | None:
    """The names of the classes: as the data set has them, or the labels that are texts, sorted."""
    feature = dataset.features[columns.label]
    names = getattr(feature, "names", None)
    if names:
        return list(names)
    values = dataset[columns.label]
    kinds = {type(value) for value in values}
    if kinds == {str}:
        return sorted(set(values))
    if kinds - {int, bool}:
        found = sorted(kind.__name__ for kind in kinds)
        raise ConfigError(
            f"{section.path}: data.columns.label is {columns.label!r}, a column of {', '.join(found)}, expected class "
            "numbers or names"
        )
    return None


def labels_of(section: Section, columns: Columns, dataset: Any, names: list[str] | None, part: str) -> list[int]:
    """The label of every row as a number."""
    if columns.label not in dataset.features:
        raise ConfigError(f"{section.path}: data.columns.label is {columns.label!r}, which the part for {part} lacks")
    numbers = {name: at for at, name in enumerate(names or ())}
    found = []
    for at, value in enumerate(dataset[columns.label]):
        label = numbers.get(value) if isinstance(value, str) else value
        if label is None or isinstance(label, float):
            raise ConfigError(
                f"{section.path}: data.columns.label is {columns.label!r}, but row {at} of the part for {part} has "
                f"{value!r} there"
            )
        found.append(int(label))
    return found


def _the_label(section: Section, features: Mapping[str, Any]) -> str:
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    for name in (*LABELS, *(classes if len(classes) == 1 else ())):
        if name in features:
            return name
    raise ConfigError(
        f"{section.path}: the key 'data.columns.label' is missing: expected one of the columns {', '.join(features)}"
    )
