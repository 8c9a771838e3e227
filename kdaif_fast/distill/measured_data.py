"""The data that influence is measured on, in the form that measuring needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .indexed import IndexedCollate, IndexedDataset, in_order, own_share, visited, with_indices

SMALL_MODEL, LARGE_BATCH = 200_000, 1024
"""Up to so many parameters, the passes of a solve take batches of so many samples."""


def training_data(train: Any, batch_size: int | None) -> Any:
    """Training data with indices, in batches."""
    data = with_indices(train)
    if not isinstance(data, IndexedDataset):
        return data
    return DataLoader(data, batch_size or 256, collate_fn=IndexedCollate(torch.utils.data.default_collate))


def default_batch_size(model: nn.Module, loader: Any) -> int:
    """Of the passes that measure: the loader's, or a large one for a small model."""
    own = _batch_size_of(loader)
    is_small = sum(p.numel() for p in model.parameters()) <= SMALL_MODEL
    return max(own, LARGE_BATCH) if is_small else own


def _batch_size_of(loader: Any) -> int:
    own = getattr(loader, "batch_size", None)
    return own or getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or 64


def validation_data(val: Any) -> Any:
    """Batches of validation samples; ValueError if there is none, TypeError if they can be had only once."""
    if isinstance(val, (tuple, Mapping)):
        return [val]
    if isinstance(val, Iterator) or not isinstance(val, Iterable):
        raise TypeError(
            f"val is a {type(val).__name__}, expected labelled batches that can be gone through again and again: a "
            "DataLoader, a list of batches, or one batch"
        )
    try:
        if len(val) == 0:
            raise ValueError("val is empty: influence is on the loss of its samples")
    except TypeError:  # it does not know its length
        pass
    return val


def own_validation_data(val: Any) -> Any:
    """Of a loader whose sampler shares samples out over processes those of this process, each once."""
    if not isinstance(val, DataLoader):
        return val
    places = visited(val)
    own = own_share(val, places)
    return val if len(own) == len(places) else in_order(val, own, _batch_size_of(val))


def require_batches(data: Any, name: str) -> Any:
    """The data, if they come in batches and there are any; TypeError or ValueError, which names the argument."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"{name} is a {type(getattr(data, 'dataset', data)).__name__}, a data set, expected batches of it: "
            "torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    try:
        count = len(data)
    except TypeError:
        return data
    if count == 0:
        why = " (drop_last=True, and fewer samples than a batch?)" if getattr(data, "drop_last", False) else ""
        raise ValueError(f"{name} is empty: it has no batch{why}")
    return data
