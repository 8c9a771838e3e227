"""Sums over the processes of a group, where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def add_number_over_ranks(number: float, group: Group, device: torch.device) -> float:
    """The sum of one number of every rank, which is waited for; the number itself without a group, at once."""
    if group is None:
        return number
    return float(add_over_ranks(torch.tensor(float(number), dtype=torch.float64, device=device), group))


def gather_over_ranks(value: Any, group: Group) -> list[Any]:
    """What every rank of the group has, any object that can be pickled; [value] without a group."""
    if group is None:
        return [value]
    process_group = _process_group(group)
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, value, group=process_group)
    return found


def rank_in(group: Group) -> int:
    """The number of this process in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(_process_group(group))


@contextlib.contextmanager
def together(group: Group, device: torch.device) -> Iterator[None]:
    """Within it every rank does work of its own, without talking; what raises on one of them raises on all.

    Else the others would wait for its part of the next sum until the group's timeout, half an hour by default. A rank
    that is killed cannot say so: torchrun stops the others then, and without torchrun the timeout does.

    Costs a sum of one number, and a wait for it.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if group is not None:
            failures = add_number_over_ranks(failed, group, device)
            if failures and not failed:
                raise RuntimeError(f"{int(failures)} other rank(s) of the group failed, and say there for what reason")


def agree(flag: bool, group: Group, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    return add_number_over_ranks(not flag, group, device) == 0


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
