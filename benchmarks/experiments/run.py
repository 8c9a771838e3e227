"""One run: a problem, a method, a seed."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.demo.training import build
from kdaif_fast.distill import Distiller, SampleFacts
from kdaif_fast.distill.clock import PARTS, Clock
from kdaif_fast.solvers import ConvergenceWarning

from .methods import METHODS, Settings, options_of
from .problems import PROBLEMS, load


class ThreadClock(Clock):
    """Seconds that one thread computes, whatever else the machine does; over all epochs."""

    def __init__(self) -> None:
        super().__init__(time.thread_time)

    def reset(self) -> None:
        """Nothing: epochs are not of interest."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch has one thread: the one that ThreadClock sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(problem_name: str, method_name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train teacher and student; what came of it, in numbers.

    The networks start from the same parameters and see the same batches in every method of a seed. Nothing is chosen by
    the test data: they are looked at once, after the last epoch.
    """
    method, data = METHODS[method_name], load(PROBLEMS[problem_name], seed)
    torch.manual_seed(seed)
    teacher, student = build(*settings.teacher), build(*settings.student)
    train = DataLoader(
        TensorDataset(*data.train), settings.batch, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, settings.learning_rate)

    distiller = Distiller(
        teacher,
        student,
        adam,
        adam,
        facts=SampleFacts(flipped=data.flipped),
        progress=False,
        **options_of(method, data, seed, settings),
    )
    distiller.clock = ThreadClock()
    with one_thread(), warnings.catch_warnings():
        # So few products are meant to leave a residual.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if method.is_two_stage:
            distiller.fit_teacher(train, settings.epochs)
        distiller.fit(train, [data.validation], settings.epochs - 1)
        last = distiller.fit(train, [data.validation], settings.epochs, [data.test])[-1]
    found = {
        "problem": problem_name,
        "method": method_name,
        "seed": seed,
        "student": last["test_student_accuracy"],
        "teacher": last["test_teacher_accuracy"],
        "seconds": {part: round(distiller.clock.seconds[part], 4) for part in PARTS if part != "evaluation"},
    }
    weights = distiller.current_weights
    if weights is not None:
        if data.flipped.any():
            kept = ("flip_auc", "flipped_below_1", "clean_below_1")  # absent before anything is measured
            found |= {key: last[key] for key in kept if key in last}
        else:
            found["clean_below_1"] = last["share_below_1"]
        if data.is_rare.any():
            found["rare_weight"] = float(weights[data.is_rare].mean())
            found["other_weight"] = float(weights[~data.is_rare].mean())
    return found
