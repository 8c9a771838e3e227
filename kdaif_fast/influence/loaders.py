"""What a loader must not do, for scores to belong to samples: shuffle them, or leave some out."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .._data import Batches

_AT_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def require_order(data: Any, name: str) -> None:
    """Raise ValueError for a DataLoader whose samples come in random order: scores are in the order of the loader."""
    if not isinstance(data, DataLoader):
        return
    sampler = _sampler(data)
    if isinstance(sampler, DistributedSampler):
        if sampler.shuffle:
            raise ValueError(
                f"{name} has a DistributedSampler that shuffles, but scores come in the loader's order: use "
                "DistributedSampler(..., shuffle=False), and know the samples by it"
            )
    elif isinstance(sampler, _AT_RANDOM):
        raise ValueError(
            f"{name} is a DataLoader with a {type(sampler).__name__}, which gives another order at every pass, but "
            "scores come in the loader's order: use DataLoader(..., shuffle=False)"
        )


def require_every_sample(data: Any, name: str) -> None:
    """Raise ValueError for a DataLoader that leaves samples out, or has some of them twice."""
    if not isinstance(data, DataLoader):
        return
    sampler = _sampler(data)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        size, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
        if size % ranks:
            raise ValueError(
                f"{name} has a DistributedSampler that repeats {-size % ranks} of its {size} samples so that {ranks} "
                "ranks have equally many, which would count them twice. Shards need not be of one size: use "
                "torch.utils.data.Subset(dataset, range(rank, len(dataset), ranks))"
            )
    left_out = _left_out(data, sampler)
    if left_out:
        raise ValueError(
            f"{name} is a DataLoader with drop_last=True, which leaves {left_out} out: use drop_last=False"
        )


def _sampler(loader: DataLoader[Any]) -> Any:
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def _left_out(loader: DataLoader[Any], sampler: Any) -> str:
    """What drop_last drops, in words; empty for nothing."""
    batch_sampler: Any = loader.batch_sampler
    if isinstance(batch_sampler, BatchSampler):
        size: int | None = batch_sampler.batch_size
        drops = batch_sampler.drop_last
    else:
        size, drops = loader.batch_size, loader.drop_last
    if not drops or size is None:
        return ""
    try:
        rest = len(sampler) % size
    except TypeError:  # an iterable data set has no length
        return "the samples of a last batch that is not full"
    return f"the last {rest} samples" if rest else ""


def samples_in(batches: Batches) -> int:
    """How many samples there are; a loader that has not been gone through yet is, without the model."""
    if batches.samples is None:
        for _ in batches:
            pass
    assert batches.samples is not None
    return batches.samples
