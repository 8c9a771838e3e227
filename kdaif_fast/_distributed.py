"""Sums over the processes of a group, where there is one."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | Literal['world'] | None"
"""A process group, "world" for the default one, or None for this process alone."""


def add_over_ranks(tensor: Tensor, group: Group) -> Tensor:
    """The sum of what every rank of the group has, in place and returned; the tensor itself without a group."""
    if group is not None:
        dist.all_reduce(tensor, group=_process_group(group))
    return tensor


def gather_objects(value: Any, group: Group) -> list[Any]:
    """What every rank of the group has, in the order of the ranks."""
    if group is None:
        return [value]
    inner = _process_group(group)
    values: list[Any] = [None] * dist.get_world_size(inner)
    dist.all_gather_object(values, value, group=inner)
    return values


def rank_in(group: Group) -> int:
    """The number of this process in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(_process_group(group))


def agree(flag: bool, group: Group, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    missing = add_over_ranks(torch.tensor(0.0 if flag else 1.0, device=device), group)
    return float(missing) == 0


def _process_group(group: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"group is {group!r}, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() first, and start the processes with torchrun"
        )
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"group is {group!r}, expected a process group, 'world' or None")
        return None
    return group
