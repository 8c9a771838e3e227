"""The parts of a data set: held out at random where there is none, with labels made wrong for experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ...indexed import LABELS
from ...runs.samples_file import SampleFacts


@dataclass(frozen=True)
class DataParts:
    """What a function that a config names may return: data, and what is known of them.

    Args:
        train: a map-style data set of (input, label) or of mappings with a label; a DataLoader; or a list of batches.
        validation, test: the same, or None: then they can be held out of `train`, if that is a data set.
        facts: what is known of the samples of `train`.
        collate: how samples become a batch; None for torch's way.
        classes: how many there are, where functions that make models ask for it.
        vocabulary: how many token ids there are, likewise.
        unaugmented: the samples of `train` without random augmentation, where that has any: what is held out is of it.
    """

    train: Any
    validation: Any = None
    test: Any = None
    facts: SampleFacts | None = None
    collate: Callable[[list[Any]], Any] | None = None
    classes: int | None = None
    vocabulary: int | None = None
    unaugmented: Any = None


class Mapped(Dataset[Any]):
    """The items of a map-style data set, through a function."""

    def __init__(self, dataset: Any, function: Callable[[Any], Any]) -> None:
        self.dataset, self.function = dataset, function

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.dataset[index])


class FlippedLabels(Dataset[Any]):
    """A data set with some labels made wrong: label i becomes (label + shift[i]) modulo the number of classes.

    Args:
        dataset: map-style, of (input, label, ...) or of mappings with a label.
        shift: int64 [N], 0 where a label stays.
        classes: how many there are.
    """

    def __init__(self, dataset: Any, shift: Tensor, classes: int) -> None:
        self.dataset, self.shift, self.classes = dataset, shift, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item, shift = self.dataset[index], int(self.shift[index])
        if not shift:
            return item
        if isinstance(item, Mapping):
            key = next(key for key in LABELS if key in item)
            return {**item, key: (item[key] + shift) % self.classes}
        inputs, label, *others = item
        return (inputs, (label + shift) % self.classes, *others)


def draw_flips(samples: int, share: float, classes: int, seed: int) -> Tensor:
    """Which labels become wrong and by how much: int64 [N], 0 for those that stay; uniform among the other classes.

    Example:
        >>> draw_flips(6, 0.5, 2, seed=0)
        tensor([0, 1, 1, 0, 0, 1])
    """
    generator = torch.Generator().manual_seed(seed + 1)  # not the numbers that held samples out
    chosen = torch.randperm(samples, generator=generator)[: round(share * samples)]
    shift = torch.zeros(samples, dtype=torch.int64)
    shift[chosen] = torch.randint(1, classes, (len(chosen),), generator=generator)
    return shift


def hold_out(parts: DataParts, counts: Mapping[str, int], seed: int) -> DataParts:
    """So many samples of `train`, drawn at random, as "validation" and "test"; the facts are those of the rest."""
    source = parts.train if parts.unaugmented is None else parts.unaugmented
    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(seed)).tolist()
    held: dict[str, Any] = {}
    for name, count in counts.items():
        places, order = sorted(order[:count]), order[count:]
        held[name] = Subset(source, places)
    if not held:
        return parts
    rest = sorted(order)
    facts = None if parts.facts is None else facts_of(parts.facts, rest)
    return replace(parts, train=Subset(parts.train, rest), facts=facts, **held)


def facts_of(facts: SampleFacts, places: Sequence[int]) -> SampleFacts:
    """What is known of the samples at these places."""
    describe = facts.describe
    return replace(
        facts,
        flipped=None if facts.flipped is None else facts.flipped[list(places)],
        true_labels=None if facts.true_labels is None else facts.true_labels[list(places)],
        groups=None if facts.groups is None else _picked(facts.groups, places),
        describe=None if describe is None else _Elsewhere(describe, places),
    )


def _picked(values: Any, places: Sequence[int]) -> Any:
    return [values[place] for place in places]


class _Elsewhere:
    """A description of sample i, which is at place i of a larger data set."""

    def __init__(self, describe: Callable[[int], Any], places: Sequence[int]) -> None:
        self.describe, self.places = describe, places

    def __call__(self, index: int) -> Any:
        return self.describe(self.places[index])


def count_classes(dataset: Any) -> int:
    """One more than the largest label: as the data set tells, or by going through it."""
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if labels is not None:
            return 1 + int(torch.as_tensor(labels).max())
    if isinstance(dataset, Subset):
        return count_classes(dataset.dataset)
    return 1 + max(int(label_of(dataset[index])) for index in range(len(dataset)))


def label_of(item: Any) -> Any:
    """The label of a sample: the second of a tuple, or that of a mapping."""
    if isinstance(item, Mapping):
        return next(item[key] for key in LABELS if key in item)
    return item[1]
