"""The ways of distilling that are compared: one setting of everything, for all problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kdaif_fast import DistillationLoss
from kdaif_fast.distill import label_revision
from kdaif_fast.distill.rules import OwnLoss, Shuffled, Sigmoid

from .problems import Data


class Settings(NamedTuple):
    """What all runs share: one setting for all problems and methods, compared with others on seeds from 100 on only."""

    epochs: int = 30
    batch: int = 64
    learning_rate: float = 2e-3  # of Adam, for both networks
    temperature: float = 1.0
    alpha: float = 0.7  # weight of the labels, against the teacher's
    teacher: tuple[int, ...] = (128, 128)  # hidden widths
    student: tuple[int, ...] = (32,)
    warmup: int = 2  # epochs before the first measurement
    ema: float = 0.5  # share of the old weight that stays at a measurement
    damping: float | str = 0.01
    products: int = 10  # with the curvature, a measurement


class Method(NamedTuple):
    """Arguments of Distiller, beside Settings."""

    title: str
    options: Callable[[Data, int], dict[str, Any]]
    is_two_stage: bool = False  # the teacher is trained first, on the labels


def _weighted(title: str, mechanism: str = "M3", **options: Any) -> Method:
    return Method(title, lambda data, seed: {"mechanism": mechanism, **options})


def _oracle(data: Data, seed: int) -> dict[str, Any]:
    weights: Tensor = data.oracle
    return {"mechanism": "M3", "weights": weights}


METHODS = {
    "vanilla": Method("vanilla KD (teacher first)", lambda data, seed: {"mechanism": "vanilla"}, is_two_stage=True),
    "online": _weighted("online KD", "online"),
    "M1": _weighted("M1 (student)", "M1"),
    "M2": _weighted("M2 (teacher)", "M2"),
    "M3": _weighted("M3 (both)"),
    "M4": _weighted("M4 (both, combined)", "M4"),
    "M3-step": _weighted("M3, measured in every step", refresh="step"),
    "LR+DS": Method("label revision, selection ours", lambda data, seed: label_revision()),
    "random": Method(
        "control: M3's weights, shuffled", lambda data, seed: {"mechanism": "M3", "rule": Shuffled(Sigmoid(), seed)}
    ),
    # Influence is measured for nothing here: as cheaply as can be.
    "own-loss": _weighted(
        "control: M3 by the own loss", rule=OwnLoss(), influence={"damping": 1.0, "tol": None, "max_iter": 1}
    ),
    "oracle": Method("oracle weights (both)", _oracle),
}
MECHANISMS = ("M1", "M2", "M3", "M4")


def options_of(method: Method, data: Data, seed: int, settings: Settings) -> dict[str, Any]:
    """Arguments of Distiller: those that all methods share, but for what the method says itself."""
    return {
        "loss": DistillationLoss(settings.temperature, settings.alpha),
        "warmup_epochs": settings.warmup,
        "ema": settings.ema,
        "influence": {
            "damping": settings.damping,
            "tol": None,
            "max_iter": settings.products,
            "keep_graphs": True,
        },
        "seed": seed,
        **method.options(data, seed),
    }
