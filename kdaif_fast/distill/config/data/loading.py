"""From the table [data] of a config to loaders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ...._config import ConfigError, Importer, told
from ...indexed import as_batch
from ...runs.samples_file import SampleFacts
from .options import KINDS, DataOptions
from .parts import DataParts, FlippedLabels, count_classes, draw_flips, hold_out

VALIDATION_SHARE = 0.1
"""Of the training samples, held out where nothing says which ones influence is to be measured on."""


@dataclass(frozen=True)
class Loaded:
    """Loaders, and what is known of their samples."""

    train: Any
    validation: Any
    test: Any
    facts: SampleFacts
    classes: int | None
    vocabulary: int | None
    inputs: Any  # those of the first training batch


def load_data(options: DataOptions, importer: Importer, seed: int, *, pin_memory: bool = False) -> Loaded:
    """Read the data, hold parts out, make labels wrong, and put loaders around them.

    Args:
        options: the table.
        importer: of what the table names.
        seed: of the order of the training samples; which are held out and which flipped is data.seed's matter.
        pin_memory: of the loaders.

    Raises:
        ConfigError: data that cannot be read, or do not fit what the table says; the message names the key.
    """
    section = options.section
    with _told(section.path, "data"):
        parts: DataParts = KINDS[options.kind].load(options.own, importer)
    parts = _held_out(options, parts)
    classes = options.classes or parts.classes
    if options.flip:
        parts, classes = _flipped(options, parts, classes)
    elif classes is None and _is_dataset(parts.train):
        classes = _classes_of(parts.train)
    for name in ("train", "validation", "test"):
        data = getattr(parts, name)
        if _is_dataset(data) and not len(data):
            raise ConfigError(f"{section.path}: data has no samples for {name}")
    loader_options: dict[str, Any] = {
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "collate_fn": parts.collate,
        "pin_memory": pin_memory,
    }
    train = parts.train
    if _is_dataset(train):
        generator = torch.Generator().manual_seed(seed)
        train = DataLoader(train, shuffle=True, generator=generator, **loader_options)
    validation, test = (
        DataLoader(data, **loader_options) if _is_dataset(data) else data for data in (parts.validation, parts.test)
    )
    firsts = [_first_batch(options, name, data) for name, data in (("train", train), ("validation", validation))]
    return Loaded(
        train=train,
        validation=validation,
        test=test,
        facts=parts.facts or SampleFacts(),
        classes=classes,
        vocabulary=parts.vocabulary,
        inputs=firsts[0].inputs,
    )


def _held_out(options: DataOptions, parts: DataParts) -> DataParts:
    """Parts of the training data as validation and test data, where the table says so or there are none."""
    section = options.section
    wanted = {"validation": options.validation, "test": options.test}
    for name in wanted:
        if name not in section and getattr(parts, name) is not None:
            wanted[name] = None  # there is one; what the adapter would hold out is not needed
    if parts.validation is None and wanted["validation"] is None:
        wanted["validation"] = VALIDATION_SHARE
    counts = {name: amount for name, amount in wanted.items() if amount is not None}
    if not counts:
        return parts
    if not _is_dataset(parts.train):
        raise ConfigError(
            f"{section.path}: data has no validation part, and its training part is a {type(parts.train).__name__}, of "
            "which no sample can be held out; expected a map-style data set, or validation data"
            if parts.validation is None
            else f"{section.path}: data.{next(iter(counts))} is given, but the training part is a "
            f"{type(parts.train).__name__}, of which no sample can be held out; expected a map-style data set"
        )
    samples = len(parts.train)
    numbers = {
        name: max(1, round(amount * samples)) if isinstance(amount, float) else amount
        for name, amount in counts.items()
    }
    if sum(numbers.values()) >= samples:
        told_numbers = " and ".join(f"{number} for {name}" for name, number in numbers.items())
        raise ConfigError(
            f"{section.path}: data.{next(iter(numbers))}: {told_numbers} held out of {samples} samples leave none to "
            "train on"
        )
    return hold_out(parts, numbers, options.seed)


def _flipped(options: DataOptions, parts: DataParts, classes: int | None) -> tuple[DataParts, int]:
    section = options.section
    if not _is_dataset(parts.train):
        raise section.wrong(
            "flip", f"but the training data are a {type(parts.train).__name__}, whose labels are its own"
        )
    classes = classes or _classes_of(parts.train)
    if classes is None or classes < 2:
        raise section.wrong("flip", f"but there are {classes} classes; data.classes can say how many there are")
    shift = draw_flips(len(parts.train), options.flip, classes, options.seed)
    facts = parts.facts or SampleFacts()
    known = shift != 0
    if facts.flipped is not None:
        known = known | facts.flipped
    return replace(
        parts,
        train=FlippedLabels(parts.train, shift, classes),
        facts=replace(facts, flipped=known),
    ), classes


def _classes_of(dataset: Any) -> int | None:
    try:
        return count_classes(dataset)
    except Exception:  # labels that are no classes, or in a form of their own: nobody may ask
        return None


def _is_dataset(data: Any) -> bool:
    """Whether it is a map-style data set, around which a loader can be put."""
    is_other = data is None or isinstance(data, (DataLoader, IterableDataset, list, tuple, Tensor))
    return not is_other and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _first_batch(options: DataOptions, name: str, data: Any) -> Any:
    """The first batch, looked at before anything is trained on it; the loader's generator stays as it was."""
    if isinstance(data, Iterator):
        raise ConfigError(
            f"{options.section.path}: data gave a {type(data).__name__} for {name}, which can be gone through only "
            "once, expected a map-style data set, a DataLoader or a list of batches"
        )
    own = getattr(data, "generator", None)
    state = None if own is None else own.get_state()
    hint = ""
    if options.kind in ("torchvision", "datasets") and "size" not in options.section:
        hint = "; pictures of different sizes need data.size = [height, width]"
    with _told(options.section.path, f"data: the first batch for {name}", hint):
        first = next(iter(data), None)
        if first is None:
            raise ConfigError(f"{options.section.path}: data gave no batch for {name}")
        batch = as_batch(first)
    if own is not None:
        own.set_state(state)
    targets = batch.targets
    if isinstance(targets, Tensor) and targets.is_floating_point() and not math.isfinite(float(targets.sum())):
        raise ConfigError(f"{options.section.path}: data: targets in the first batch for {name} are not finite")
    return batch


@contextmanager
def _told(path: Any, what: str, hint: str = "") -> Iterator[None]:
    """Whatever is raised within becomes a ConfigError; those stay as they are."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # data sets raise what they like
        is_about_shapes = "stack expects each tensor" in str(error)
        raise ConfigError(f"{path}: {what}: {told(error)}{hint if is_about_shapes else ''}") from error
