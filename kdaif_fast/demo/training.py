"""The demo's training: a teacher, and two students that differ in nothing but the weights of their samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._model import DistillationLoss
from ..influence import influence_scores, sigmoid_weights
from ..ops import kd_loss
from .data import CLASSES, Digits

BATCH = 64


class Settings(NamedTuple):
    """What can be chosen for a run."""

    epochs: int = 30
    warm_up: int = 2  # epochs before the first influence is measured
    temperature: float = 1.0
    alpha: float = 0.7  # weight of the given labels, against the teacher's
    gamma: float = 10.0  # steepness of the weights
    memory: float = 0.8  # share of the old weights that a refresh keeps
    damping: float = 0.01
    products: int = 10  # curvature products per solve
    learning_rate: float = 2e-3


class Outcome(NamedTuple):
    """What one seed's run found."""

    accuracy: dict[str, float]  # test accuracy of "teacher", "vanilla" and "weighted"
    phi: Tensor  # influence at the last refresh, [N]
    weights: Tensor  # final weights, [N]
    training_seconds: float
    influence_seconds: float


def build(*widths: int) -> nn.Module:
    """A multi-layer perceptron on 64 pixels."""
    sizes = (64, *widths)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], CLASSES))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images classified rightly."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def train(data: Digits, settings: Settings, seed: int, on_epoch: Callable[[], object] = lambda: None) -> Outcome:
    """Train teacher and students together, one stage, as KD-AIF does (mechanism M1: the student is weighted).

    Both students start from the same parameters and see the same batches and the same teacher. The weighted one's
    samples are weighted by their influence on its own validation loss, measured again before every epoch after the
    warm-up: a student that has trained long on flipped labels has memorised them, and they no longer stand out.
    """
    torch.manual_seed(seed)
    teacher, vanilla = build(128, 128), build(32)
    weighted = copy.deepcopy(vanilla)
    optimizers = [torch.optim.Adam(m.parameters(), settings.learning_rate) for m in (teacher, vanilla, weighted)]
    loss = partial(kd_loss, temperature=settings.temperature, alpha=settings.alpha)
    N = len(data.train_y)
    phi, weights = torch.zeros(N), torch.ones(N)
    training_seconds = influence_seconds = 0.0
    for epoch in range(settings.epochs):
        start = time.perf_counter()
        if epoch >= settings.warm_up:
            phi = _measure(weighted, teacher, data, settings)
            fresh = sigmoid_weights(phi, gamma=settings.gamma)
            weights = fresh if epoch == settings.warm_up else weights.lerp(fresh, 1 - settings.memory)
        middle = time.perf_counter()
        for index in torch.randperm(N).split(BATCH):
            x, y = data.train_x[index], data.train_y[index]
            teacher_logits = teacher(x)
            objective = nn.functional.cross_entropy(teacher_logits, y)
            guide = teacher_logits.detach()
            objective = objective + loss(vanilla(x), guide, y, reduction="mean")
            objective = objective + loss(weighted(x), guide, y, weight=weights[index], reduction="mean")
            for optimizer in optimizers:
                optimizer.zero_grad()
            objective.backward()  # three sums of separate networks: each gets its own gradient
            for optimizer in optimizers:
                optimizer.step()
        influence_seconds += middle - start
        training_seconds += time.perf_counter() - middle
        on_epoch()
    networks = {"teacher": teacher, "vanilla": vanilla, "weighted": weighted}
    scores = {name: accuracy(network, data.test_x, data.test_y) for name, network in networks.items()}
    return Outcome(scores, phi, weights, training_seconds, influence_seconds)


def _measure(student: nn.Module, teacher: nn.Module, data: Digits, settings: Settings) -> Tensor:
    """Influence of every training sample's distillation loss on the student's validation cross-entropy."""
    with torch.no_grad():
        guide = teacher(data.train_x)
    return influence_scores(
        student,
        (data.train_x, data.train_y, guide),
        (data.val_x, data.val_y),
        loss=DistillationLoss(settings.temperature, settings.alpha),
        damping=settings.damping,
        tol=None,
        max_iter=settings.products,
    )
