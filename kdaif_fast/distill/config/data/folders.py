"""Data sets of torchvision, or of the same form, already on disk: CIFAR10, SVHN, ImageFolder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...._config import ConfigError, Importer, Section, meant, require_known, told
from ...runs.samples_file import SampleFacts
from .images import KEYS as IMAGE_KEYS
from .images import ImageOptions, Pictured, read_images, readers
from .parts import DataParts, Mapped, count_classes

KEYS = ("dataset", "root", "splits", *IMAGE_KEYS)
SPLITS = ("train", "validation", "test")
_VALIDATION_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class Options:
    """Which data set, where it is, and how its parts are told apart."""

    section: Section
    dataset: str
    root: Path
    splits: dict[str, Any]
    images: ImageOptions


def read(section: Section) -> Options:
    """The keys of this kind, checked; ConfigError names the key."""
    dataset = section.text("dataset")
    root = section.path_to("root")
    assert root is not None
    splits = section.settings("splits")
    require_known(section.path, splits, SPLITS, "data.splits.")
    for name, split in splits.items():
        if not isinstance(split, (str, Mapping)) or not split:
            raise ConfigError(
                f"{section.path}: data.splits.{name} is {split!r}, expected a part's name (or folder below root), or a "
                "table of arguments, as { train = true }"
            )
    return Options(section, dataset, root, splits, read_images(section))


def load(options: Options, importer: Importer) -> DataParts:
    """Its parts, as ([C, H, W], label)."""
    section = options.section
    made = _class(options, importer)
    arguments = _arguments(options, made)
    training_reader, reader = readers(options.images, importer)
    found: dict[str, Any] = {}
    for name, given in arguments.items():
        try:
            found[name] = made(**given)
        except Exception as error:  # data sets raise what they like
            shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
            raise ConfigError(
                f"{section.path}: data.dataset is {options.dataset!r}, which failed for {name}, as "
                f"{options.dataset}({shown}): {told(error)}"
            ) from error
    raw = found["train"]
    names = getattr(raw, "classes", None)
    _require_same_classes(section, found)
    views: dict[str, Any] = {
        name: Mapped(dataset, Pictured(reader)) for name, dataset in found.items() if name != "train"
    }
    return DataParts(
        Mapped(raw, Pictured(training_reader)),
        **views,
        facts=SampleFacts(class_names=None if names is None else [str(name) for name in names], describe=_Shown(raw)),
        classes=len(names) if names else count_classes(raw),
        unaugmented=Mapped(raw, Pictured(reader)),
    )


class _Shown:
    """The picture of a sample, as it is in the data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Any:
        return self.dataset[index][0]


def _class(options: Options, importer: Importer) -> Any:
    """The class of the data set: of torchvision, or "module:name"."""
    section = options.section
    if ":" in options.dataset:
        return importer.function("data.dataset", options.dataset)
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(
            f"{section.path}: data.kind is 'torchvision': pip install torchvision (or kind = \"datasets\", which reads "
            "folders of pictures too)"
        ) from error
    found = getattr(datasets, options.dataset, None)
    if found is None:
        close = meant(options.dataset, [name for name in dir(datasets) if name[:1].isupper()])
        raise section.wrong("dataset", f"which torchvision.datasets does not have{close}")
    return found


def _arguments(options: Options, made: Any) -> dict[str, dict[str, Any]]:
    """What the class is called with for each part."""
    parameters = inspect.signature(made).parameters
    root = options.root
    splits: dict[str, Any] = {}
    if "train" in parameters:
        splits = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in parameters:
        splits = {"train": "train"}
    elif (root / "train").is_dir():
        places = {"train": ("train",), "validation": _VALIDATION_FOLDERS, "test": ("test",)}
        there = {part: [name for name in names if (root / name).is_dir()] for part, names in places.items()}
        splits = {part: names[0] for part, names in there.items() if names}
    splits = {"train": {}, **splits, **options.splits}
    found = {}
    for name, split in splits.items():
        if isinstance(split, Mapping):
            arguments = dict(split)
        elif "split" in parameters:
            arguments = {"split": split}
        else:
            folder = root / split
            if not folder.is_dir():
                raise ConfigError(f"{options.section.path}: data.splits.{name} is {split!r}, but there is no {folder}")
            arguments = {"root": str(folder)}
        found[name] = {"root": str(root), **arguments}
    return found


def _require_same_classes(section: Section, found: Mapping[str, Any]) -> None:
    """Folders are numbered in each part for itself: a class that one part lacks shifts all later ones."""
    names = {name: list(dataset.classes) for name, dataset in found.items() if hasattr(dataset, "classes")}
    for name, classes in names.items():
        if classes != names.get("train", classes):
            raise ConfigError(
                f"{section.path}: data.splits.{name} has the classes {classes[:10]}, expected those of the "
                f"training part: {names['train'][:10]}"
            )
