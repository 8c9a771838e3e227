"""Samples that know their place in the data set: what weights are kept by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from .._data import size_of
from .._model import Batch, unpack_batch

LABELS = ("labels", "label")
"""Where batches of Hugging Face data have their targets."""


class IndexedSample(NamedTuple):
    """A sample of a data set, and its place there."""

    place: int
    sample: Any


class IndexedBatch(NamedTuple):
    """A batch, and the place of each of its samples in the data set: int64 [n]."""

    indices: Tensor
    batch: Any


class IndexedDataset(Dataset[IndexedSample]):
    """A map-style data set whose item i is IndexedSample(i, the other's item i)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> IndexedSample:
        return IndexedSample(int(index), self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[IndexedSample]:
        """Several at once, as the other data set does it if it can."""
        several = getattr(self.dataset, "__getitems__", None)
        samples = several(indices) if several is not None else [self.dataset[index] for index in indices]
        return [IndexedSample(int(index), sample) for index, sample in zip(indices, samples, strict=True)]


class IndexedCollate:
    """Brings samples together as another collate function does, beside their indices."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Sequence[IndexedSample]) -> IndexedBatch:
        """From a list of IndexedSample."""
        indices = torch.tensor([sample.place for sample in samples], dtype=torch.int64)
        return IndexedBatch(indices, self.collate_fn([sample.sample for sample in samples]))


def with_indices(data: Any) -> Any:
    """The same data, with each sample's index in the data set beside it.

    Args:
        data: a map-style data set, whose items become `IndexedSample(place, sample)`; or a DataLoader over one, or a
            list of batches, which then give `IndexedBatch(indices, batch)`. What has indices already is returned as it
            is.

    Returns:
        A data set, an ordinary DataLoader (same sampler, batch size, workers, collate function, generator), or a list.

    Raises:
        TypeError: data of which no sample has a fixed place: an iterable data set, a generator, a DataLoader subclass
            that iterates in its own way, or one without automatic batching. Give the data set itself an index then:
            `DataLoader(with_indices(dataset), collate_fn=IndexedCollate(collate))`.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> dataset = TensorDataset(torch.arange(6.0)[:, None], torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> for indices, (inputs, targets) in with_indices(DataLoader(dataset, batch_size=4)):
        ...     print(indices, targets)
        tensor([0, 1, 2, 3]) tensor([0, 1, 0, 1])
        tensor([4, 5]) tensor([0, 1])
    """
    if isinstance(data, IndexedDataset) or has_indices(data):
        return data
    if isinstance(data, DataLoader):
        return _indexed_loader(data)
    if isinstance(data, (list, tuple)) and data and all(isinstance(batch, (tuple, list, Mapping)) for batch in data):
        return _numbered(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, Tensor)):
        return IndexedDataset(data)
    raise TypeError(
        f"data is a {type(data).__name__}, whose samples have no index; expected a map-style data set (__getitem__ "
        "and __len__), a DataLoader over one, or a list of batches"
    )


def has_indices(data: Any) -> bool:
    """Whether this gives IndexedBatch: a loader that with_indices has made, or a list."""
    if isinstance(data, (list, tuple)):
        return bool(data) and all(isinstance(batch, IndexedBatch) for batch in data)
    return isinstance(getattr(data, "collate_fn", None), IndexedCollate)


def require_indices(batch: Any) -> IndexedBatch:
    """The batch as IndexedBatch; TypeError, which says how to get one, for any other."""
    if isinstance(batch, IndexedBatch):
        return batch
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and _are_indices(batch[0], batch[1]):
        return IndexedBatch(*batch)  # a loader of another library has made an ordinary tuple of it
    raise TypeError(
        f"batch is a {type(batch).__name__} without the indices of its samples, by which their weights are kept. "
        "Iterate over kdaif_fast.distill.with_indices(loader), or give IndexedBatch(indices, batch)"
    )


def _are_indices(indices: Any, batch: Any) -> bool:
    whole = isinstance(indices, Tensor) and indices.dim() == 1 and indices.dtype == torch.int64
    return whole and isinstance(batch, (tuple, list, Mapping)) and size_of(as_batch(batch)) == len(indices)


def as_batch(batch: Any, name: str = "batch") -> Batch:
    """(inputs, targets[, teacher_logits]) of a batch in any form; mappings with "labels" are inputs and targets too."""
    if isinstance(batch, Mapping) and "targets" not in batch:
        for key in LABELS:
            if key in batch:
                return unpack_batch(({k: v for k, v in batch.items() if k != key}, batch[key]), name)
    return unpack_batch(batch, name)


def on_device(batch: Any, device: torch.device) -> Any:
    """Every tensor in it on the device."""
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch)


def sample_count(data: Any) -> int:
    """N: how many places there are, in a loader or list with indices."""
    if isinstance(data, (list, tuple)):
        return 1 + max((int(batch.indices.max()) for batch in data if len(batch.indices)), default=-1)
    return len(data.dataset)


def visited(data: Any) -> Tensor:
    """The places that a loader with indices comes to, each once: ascending, but of a list in its order.

    All places, but for a list and a SubsetRandomSampler.
    """
    if isinstance(data, (list, tuple)):
        return torch.cat([batch.indices for batch in data])[_first_times(data)]
    sampler = getattr(data, "sampler", None)
    sampler = getattr(getattr(data, "batch_sampler", None), "sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(list(sampler.indices), dtype=torch.int64).unique()
    return torch.arange(sample_count(data))


def own_share(data: Any, places: Tensor) -> Tensor:
    """Of these places those that fall to this process, if the loader's sampler shares samples out over processes.

    Each place falls to one process, and to the same one in every epoch: not what the sampler gives, which shuffles, and
    repeats samples where they cannot be shared out evenly.
    """
    sampler, batches = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    for sharing in (sampler, batches, getattr(batches, "sampler", None)):
        # Of torch and Lightning, and of Accelerate.
        for rank, ranks in (("rank", "num_replicas"), ("process_index", "num_processes")):
            if hasattr(sharing, rank) and hasattr(sharing, ranks):
                return places[getattr(sharing, rank) :: getattr(sharing, ranks)]
    return places


def in_order(data: Any, indices: Tensor, batch_size: int) -> Any:
    """The samples at these places, in this order: a DataLoader, or a list, of IndexedBatch.

    Of a list the places have to be in the order of `visited`.
    """
    if isinstance(data, (list, tuple)):
        return list(_picked(data, indices))
    workers = data.num_workers
    return DataLoader(
        data.dataset,
        batch_size=batch_size,
        sampler=indices.tolist(),
        collate_fn=data.collate_fn,
        num_workers=workers,
        pin_memory=data.pin_memory,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context if workers else None,
    )


def shared_samples(train: Any, validation: Any) -> int:
    """How many samples two loaders have in common, as far as their data sets tell: parts of one data set."""
    first, second = _places(train), _places(validation)
    if first is None or second is None or first[0] is not second[0]:
        return 0
    return len(first[1] & second[1])


def _places(data: Any) -> tuple[Any, set[int]] | None:
    """The data set at the bottom, and the places in it."""
    dataset = getattr(data, "dataset", None)
    if dataset is None:
        return None
    try:
        places = visited(data).tolist() if isinstance(data, DataLoader) else list(range(len(dataset)))
        while isinstance(dataset, (IndexedDataset, Subset)):
            if isinstance(dataset, Subset):
                indices = dataset.indices
                places = [int(indices[place]) for place in places]
            dataset = dataset.dataset
    except (TypeError, IndexError):  # no length, or a sampler of its own making
        return None
    return dataset, set(places)


def _indexed_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"the loader's data set is a {type(dataset).__name__}, an iterable one: no sample has an index by which "
            "weights could be kept; expected a map-style data set"
        )
    if type(loader).__iter__ is not DataLoader.__iter__ or loader.batch_sampler is None:
        raise TypeError(
            f"the loader is a {type(loader).__name__} that makes batches in a way of its own, so its samples' indices "
            "are not known. Make it over kdaif_fast.distill.with_indices(dataset), with collate_fn=IndexedCollate(...)"
        )
    batching: dict[str, Any]
    if loader.batch_size is None:
        batching = {"batch_sampler": loader.batch_sampler}
    else:
        batching = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    assert loader.collate_fn is not None
    return DataLoader(
        dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset),
        **batching,
        collate_fn=IndexedCollate(loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _numbered(batches: Sequence[Any]) -> list[IndexedBatch]:
    found, start = [], 0
    for at, batch in enumerate(batches):
        size = size_of(as_batch(batch, f"batch {at}"))
        found.append(IndexedBatch(torch.arange(start, start + size), batch))
        start += size
    return found


def _picked(batches: Sequence[IndexedBatch], indices: Tensor) -> Iterator[IndexedBatch]:
    """Of each batch of a list the samples that are asked for, each once; batches as they are, if all of theirs are."""
    for indexed, is_first in zip(batches, _first_times(batches).split([len(b.indices) for b in batches]), strict=True):
        chosen = torch.isin(indexed.indices, indices) & is_first
        if bool(chosen.all()):
            yield indexed
        elif bool(chosen.any()):
            size = len(indexed.indices)

            def pick(x: Any, chosen: Tensor = chosen, size: int = size) -> Any:
                return x[chosen.to(x.device)] if isinstance(x, Tensor) and x.dim() and len(x) == size else x

            yield IndexedBatch(indexed.indices[chosen], tree_map(pick, indexed.batch))


def _first_times(batches: Sequence[IndexedBatch]) -> Tensor:
    """Of all samples of a list, one after another, whether each has not been there before: bool."""
    places, which = torch.cat([batch.indices for batch in batches]).unique(return_inverse=True)
    at = torch.arange(len(which))
    first = torch.full_like(places, len(which)).scatter_reduce_(0, which, at, "amin")
    return first[which] == at
