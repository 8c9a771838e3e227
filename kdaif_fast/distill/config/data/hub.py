"""Data sets of Hugging Face `datasets` on disk: of save_to_disk, of parquet, CSV or JSON files, picture folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ...._config import ConfigError, Importer, Section, meant, require_known, told
from ...runs.samples_file import SampleFacts
from .columns import COLUMNS, Columns, choose_columns, class_names, labels_of
from .images import KEYS as IMAGE_KEYS
from .images import ImageOptions, Pictured, read_images, readers
from .parts import DataParts, Mapped
from .text import Encoded, PaddedCollate, Vocabulary

TEXT_KEYS = ("tokenizer", "vocabulary", "longest")
KEYS = ("path", "format", "splits", "columns", "cache", *TEXT_KEYS, *IMAGE_KEYS)
FORMATS = ("parquet", "csv", "json", "imagefolder", "disk")
SPLITS = ("train", "validation", "test")
_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")  # what save_to_disk leaves
_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Options:
    """Where the data set is, and what of it is used how."""

    section: Section
    path: Path
    format: str | None
    splits: dict[str, str]
    columns: dict[str, Any]
    cache: str | None
    tokenizer: Path | None
    vocabulary: int
    longest: int
    images: ImageOptions


def read(section: Section) -> Options:
    """The keys of this kind, checked; ConfigError names the key."""
    path = section.path_to("path")
    assert path is not None
    splits = section.settings("splits")
    require_known(section.path, splits, SPLITS, "data.splits.")
    columns = section.table("columns", COLUMNS)
    found: dict[str, Any] = {key: columns.texts(key, None) for key in ("text", "features")}
    found |= {key: columns.text(key, None) for key in ("image", "label", "group")}
    inputs = [key for key in ("text", "image", "features") if found[key]]
    if len(inputs) > 1:
        raise ConfigError(f"{section.path}: data.columns has {' and '.join(inputs)}, expected one of them")
    for name, split in splits.items():
        if not isinstance(split, str) or not split:
            raise ConfigError(f"{section.path}: data.splits.{name} is {split!r}, expected a split's name")
    cache = section.text("cache", None)
    return Options(
        section=section,
        path=path,
        format=section.choice("format", FORMATS, None),
        splits=splits,
        columns=found,
        cache=None if cache is None else str(section.path.parent / cache),
        tokenizer=section.path_to("tokenizer", None),
        vocabulary=section.integer("vocabulary", 20_000, least=3),
        longest=section.integer("longest", 256, least=1),
        images=read_images(section),
    )


def load(options: Options, importer: Importer) -> DataParts:
    """Its parts: pictures as ([C, H, W], label), texts as ({"input_ids": ...}, label), numbers as ([F], label)."""
    section = options.section
    found = _read(options)
    chosen = _chosen(options, found)
    train = chosen["train"]
    columns = choose_columns(section, options.columns, train)
    names = class_names(section, columns, train)
    labels = {name: labels_of(section, columns, part, names, name) for name, part in chosen.items()}
    if "test" in labels and "test" not in options.splits and min(labels["test"], default=0) < 0:
        del chosen["test"], labels["test"]  # a test part whose labels are kept secret, as those of GLUE
    for name, some in labels.items():
        if min(some, default=0) < 0:
            raise ConfigError(f"{section.path}: data.splits.{name} has labels below 0, which are no classes")
    groups: Any = None if columns.group is None else [_plain(group) for group in train[columns.group]]
    facts = SampleFacts(class_names=names, groups=groups, describe=_Shown(train, columns))
    classes = max(len(names or ()), 1 + max(labels["train"], default=0))
    if columns.image is not None:
        return _pictures(options, importer, chosen, labels, columns, facts, classes)
    if columns.text:
        return _texts(options, chosen, labels, columns, facts, classes)
    parts: dict[str, Any] = {
        name: TensorDataset(_numbers(section, part, columns), torch.tensor(labels[name]))
        for name, part in chosen.items()
    }
    return DataParts(**parts, facts=facts, classes=classes)


def _pictures(
    options: Options,
    importer: Importer,
    chosen: Mapping[str, Any],
    labels: Mapping[str, list[int]],
    columns: Columns,
    facts: SampleFacts,
    classes: int,
) -> DataParts:
    training_reader, reader = readers(options.images, importer)
    rows = {name: _Labelled(part, columns.image, labels[name]) for name, part in chosen.items()}
    views: dict[str, Any] = {name: Mapped(row, Pictured(reader)) for name, row in rows.items()}
    augmented = Mapped(rows["train"], Pictured(training_reader))
    return DataParts(**{**views, "train": augmented}, unaugmented=views["train"], facts=facts, classes=classes)


def _texts(
    options: Options,
    chosen: Mapping[str, Any],
    labels: Mapping[str, list[int]],
    columns: Columns,
    facts: SampleFacts,
    classes: int,
) -> DataParts:
    section = options.section
    texts = {name: [_strings(section, part, column) for column in columns.text] for name, part in chosen.items()}
    if options.tokenizer is None:
        joined = {name: [" ".join(several) for several in zip(*some, strict=True)] for name, some in texts.items()}
        vocabulary = Vocabulary(joined["train"], options.vocabulary)
        encoded: dict[str, Any] = {
            name: {"input_ids": [vocabulary.encode(text, options.longest) for text in some]}
            for name, some in joined.items()
        }
        padding, size = 0, len(vocabulary)
    else:
        tokenizer = _tokenizer(options)
        encoded = {
            name: dict(tokenizer(*some, truncation=True, max_length=options.longest)) if some[0] else {"input_ids": []}
            for name, some in texts.items()
        }
        padding, size = tokenizer.pad_token_id or 0, len(tokenizer)
    parts: dict[str, Any] = {name: Encoded(encoded[name], labels[name]) for name in chosen}
    return DataParts(**parts, facts=facts, classes=classes, collate=PaddedCollate(padding), vocabulary=size)


class _Labelled:
    """Rows as (picture, label), the label a number already."""

    def __init__(self, dataset: Any, column: str | None, labels: list[int]) -> None:
        self.dataset, self.column, self.labels = dataset, column, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index][self.column], self.labels[index]


class _Shown:
    """The text or the picture of a sample, as it is in the data set."""

    def __init__(self, dataset: Any, columns: Columns) -> None:
        self.dataset, self.columns = dataset, columns

    def __call__(self, index: int) -> Any:
        row, columns = self.dataset[index], self.columns
        if columns.image is not None:
            return row[columns.image]
        if columns.text:
            return "\n".join(row[column] for column in columns.text)
        return {column: row[column] for column in columns.features}


def _read(options: Options) -> Mapping[str, Any]:
    """The splits by their names."""
    section, path = options.section, options.path
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{section.path}: data.kind is 'datasets': pip install datasets") from error
    kind = options.format or _SUFFIXES.get(path.suffix)
    if kind is None and path.is_dir() and any((path / name).exists() for name in _DISK):
        kind = "disk"
    try:
        with _quiet():
            if kind == "disk":
                found: Any = datasets.load_from_disk(str(path))
            elif path.is_file():
                if kind is None:
                    raise section.wrong("path", f"expected a folder, or a file that ends in {', '.join(_SUFFIXES)}")
                found = datasets.load_dataset(kind, data_files=str(path), cache_dir=options.cache)
            elif kind is None:
                found = datasets.load_dataset(str(path), cache_dir=options.cache)
            else:
                found = datasets.load_dataset(kind, data_dir=str(path), cache_dir=options.cache)
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, for what is on disk may be anything
        raise ConfigError(f"{section.path}: data.path is {str(path)!r}, which cannot be read: {told(error)}") from error
    return found if isinstance(found, Mapping) else {"train": found}


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it `datasets` shows no progress bars."""
    from datasets.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _chosen(options: Options, found: Mapping[str, Any]) -> dict[str, Any]:
    """The splits for training, validation and test: those that the file names, else those that are called so."""
    section = options.section
    for name, split in options.splits.items():
        if split not in found:
            raise ConfigError(
                f"{section.path}: data.splits.{name} is {split!r}, expected one of {', '.join(found)}"
                f"{meant(split, found)}"
            )
    taken = set(options.splits.values())
    chosen = {name: found[split] for name, split in options.splits.items()}
    chosen |= {name: found[name] for name in SPLITS if name not in chosen and name in found and name not in taken}
    if "train" not in chosen:
        if len(found) > 1:
            raise ConfigError(
                f"{section.path}: the key 'data.splits.train' is missing: there are the splits {', '.join(found)}, of "
                "which none is called 'train'"
            )
        chosen["train"] = next(iter(found.values()))
    return chosen


def _tokenizer(options: Options) -> Any:
    section = options.section
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise section.wrong("tokenizer", "which needs transformers: pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(str(options.tokenizer), local_files_only=True)
    except Exception as error:  # of many kinds
        raise section.wrong("tokenizer", f"which cannot be loaded: {told(error)}") from error


def _strings(section: Section, part: Any, column: str) -> list[str]:
    texts = list(part[column])
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"{section.path}: data.columns.text is {column!r}, but row {at} has {text!r} there")
    return texts


def _numbers(section: Section, part: Any, columns: Columns) -> torch.Tensor:
    """The columns of numbers side by side, float32 [N, F]."""
    try:
        arrays = [torch.tensor(list(part[column]), dtype=torch.float32) for column in columns.features]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{section.path}: data.columns.features is {columns.features}, expected columns of numbers: {error}"
        ) from error
    return torch.cat([array.view(len(array), -1) for array in arrays], 1)


def _plain(group: Any) -> int | str:
    return group if isinstance(group, int) else str(group)
