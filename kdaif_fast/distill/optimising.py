"""Optimisers and schedulers, given ready-made or as functions that make them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

OptimizerLike: TypeAlias = "Optimizer | Callable[[Iterable[Tensor]], Optimizer]"
SchedulerLike: TypeAlias = "LRScheduler | Callable[[Optimizer], LRScheduler]"


def make_optimizer(optimizer: Any, model: nn.Module, name: str) -> Optimizer:
    """The optimizer, or what the factory makes of the parameters that require grad; checked to be of this model."""
    if not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise TypeError(
                f"{name} is {optimizer!r}, expected a torch optimizer, or a function of the parameters that makes one"
            )
        made = optimizer([p for p in model.parameters() if p.requires_grad])
        if not isinstance(made, Optimizer):
            raise TypeError(f"{name} made a {type(made).__name__}, expected a torch optimizer")
        return made
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{name} has none of the parameters of the {name.split('_')[0]}")
    return optimizer


def make_scheduler(scheduler: Any, optimizer: Optimizer | None, name: str) -> LRScheduler | None:
    """The scheduler, or what the factory makes of the optimizer; checked to be of this optimizer."""
    if scheduler is None:
        return None
    if optimizer is None:
        raise ValueError(f"{name} is given, but {name.replace('scheduler', 'optimizer')} is None")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            f"{name} is a ReduceLROnPlateau, which wants a number at every step; expected any other scheduler"
        )
    if isinstance(scheduler, LRScheduler):
        if scheduler.optimizer is not optimizer:
            raise ValueError(f"{name} is of another optimizer than {name.replace('scheduler', 'optimizer')}")
        return scheduler
    if not callable(scheduler):
        raise TypeError(f"{name} is {scheduler!r}, expected a scheduler, or a function of the optimizer that makes one")
    made = scheduler(optimizer)
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        raise TypeError(f"{name} made a {type(made).__name__}, expected a torch.optim.lr_scheduler.LRScheduler")
    return made


def end_epoch(scheduler: LRScheduler | None) -> None:
    """One step of the scheduler, if there is one."""
    if scheduler is None:
        return
    with warnings.catch_warnings():
        # The optimizer's steps may have been taken by the process that this one goes on for.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()


def take_step(optimizer: Optimizer, clip_norm: float | None, share: float = 1.0) -> None:
    """One step with the gradients that are there, clipped to a norm if one is given; they are gone afterwards.

    `share` is that of the batches of a whole group that they are of, by whose number each has been divided.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if share != 1:
        for p in parameters:
            if p.grad is not None:
                p.grad.div_(share)
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad()
