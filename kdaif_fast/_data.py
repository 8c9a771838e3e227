"""Samples in batches: one batch, or a loader that is gone through again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ._model import Batch, unpack_batch

LOOKED_AT = 4096
"""About how many elements of a tensor are looked at, at most, to know it again."""


class Batches:
    """The batches of a data set, with a name for each that errors can use.

    Args:
        data: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or something that can be
            iterated again and again and gives such batches, each time the same samples: a DataLoader, a list of
            batches.
        name: what the caller calls the data.
        device: where a loader's tensors are moved to; None leaves them where they are. One batch is never moved.
        may_be_empty: whether a loader without a batch is one, as the share of one of many processes can be.
        in_order: whether a loader has to give the same samples in the same order at every pass. Looked for are the
            targets of all and the inputs of the first and the last sample of every batch, some thousand numbers of
            each, as far as they are on the CPU.

    Raises:
        TypeError: an iterator, which can be gone through only once.
        ValueError (while iterating): no batch at all, unless there may be none; a pass with other numbers of batches or
            samples than the first; with `in_order`, one with other samples.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        device: torch.device | None = None,
        *,
        may_be_empty: bool = False,
        in_order: bool = False,
    ) -> None:
        self.name, self.device, self._may_be_empty = name, device, may_be_empty
        self.is_one = _is_batch(data)
        if not self.is_one and not isinstance(data, Iterable):
            unpack_batch(data, name)  # which says what a batch is
        if isinstance(data, Iterator):
            raise TypeError(
                f"{name} is a {type(data).__name__}, which can be gone through only once, expected a batch, a "
                "DataLoader or a list of batches"
            )
        self._data = data
        self._in_order = in_order and not isinstance(data, (list, tuple))  # those hold their batches
        self._first: tuple[int, int] | None = None
        self._look: bytes | None = None

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        """(label, batch) of each batch, in order."""
        if self.is_one:
            yield self.name, unpack_batch(self._data, self.name)
            return
        batches = samples = 0
        seen = hashlib.blake2b(digest_size=16)
        for batch in self._data:
            label = f"batch {batches} of {self.name}"
            unpacked = unpack_batch(batch, label)
            batches, samples = batches + 1, samples + size_of(unpacked)
            if self._in_order:
                _look_at(unpacked, seen)
            yield label, self._moved(unpacked)
        if not batches and not self._may_be_empty:
            raise ValueError(f"{self.name} is empty: it gave no batch")
        if self._first is None:
            self._first, self._look = (batches, samples), seen.digest()
        elif self._first != (batches, samples):
            raise ValueError(
                f"{self.name} gave {batches} batches with {samples} samples, but {self._first[0]} with "
                f"{self._first[1]} when it was first gone through; every pass has to give the same samples"
            )
        elif self._look != seen.digest():
            raise ValueError(
                f"{self.name} gave other samples, or the same in another order, than when it was first gone through: "
                "no shuffling, and no random augmentation"
            )

    def _moved(self, batch: Batch) -> Batch:
        if self.device is None:
            return batch
        device = self.device
        return Batch(*tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, tuple(batch)))

    @property
    def samples(self) -> int | None:
        """How many samples there are, if that is known: of a loader, once it has been gone through."""
        if self.is_one:
            return size_of(unpack_batch(self._data, self.name))
        return None if self._first is None else self._first[1]

    @property
    def batches(self) -> int | None:
        """How many batches there are, if that is known, as `samples`."""
        return 1 if self.is_one else None if self._first is None else self._first[0]

    @property
    def count(self) -> int | None:
        """How many batches there are, if the loader says so."""
        if self.is_one:
            return 1
        try:
            return len(self._data)
        except TypeError:  # an iterable data set has no length
            return None


def size_of(batch: Batch) -> int:
    """The number of samples of a batch, as its tensors tell: those of the targets, else of the inputs."""
    for part in (batch.targets, batch.inputs):
        for leaf in tree_leaves(part):
            if isinstance(leaf, Tensor) and leaf.dim():
                return len(leaf)
    return 0


def _look_at(batch: Batch, seen: Any) -> None:
    """Take a part of a batch into a hash; all of it would cost more than a small model."""
    size = size_of(batch)
    for leaf in tree_leaves(tuple(batch)):
        if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or leaf.layout != torch.strided:
            continue
        values = leaf.detach().resolve_conj().resolve_neg()
        is_by_sample = values.dim() > 1 and 0 < len(values) == size
        for part in (values[0], values[-1]) if is_by_sample else (values,):
            some = part.reshape(-1)[:: 1 + part.numel() // LOOKED_AT]
            seen.update(some.contiguous().view(torch.uint8).numpy().data)


def _is_batch(data: Any) -> bool:
    """Whether this is one batch: a list whose items all look like batches themselves is several."""
    if isinstance(data, list):
        return not all(isinstance(item, (tuple, list, Mapping)) for item in data)
    return isinstance(data, (tuple, Mapping))
