"""Training steps with weights against plain ones, eager and in a CUDA graph; influence end to end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.func_influence import func_influence_scores
from benchmarks.baselines.naive_influence import naive_influence_scores
from benchmarks.baselines.plain_mlp_influence import plain_influence_scores
from kdaif_fast import influence_weights, sigmoid_weights
from kdaif_fast.distill import Distiller
from kdaif_fast.per_sample import weighted_step

from .cases import Case, Target, unchecked
from .models import MODELS, Training
from .scale import Scale
from .timing import Call, graph_of

PLAIN = "plain step"


def step_cases(scale: Scale) -> list[Case]:
    """The one-pass weighted step, weights by the influence along a direction that is there."""
    kept = {name: functools.cache(functools.partial(_training, build, scale)) for name, build in MODELS.items()}
    return [
        _step_case(scale, name, kept[name], narrow, captured)
        for captured in (False, True)
        for name in MODELS
        for narrow in (True, False)
    ]


def _step_case(scale: Scale, name: str, kept: Callable[[], Any], narrow: bool, captured: bool) -> Case:
    ways = {
        PLAIN: functools.partial(_call, _plain, kept, scale, narrow, captured),
        "kdaif_fast": functools.partial(_call, _weighted, kept, scale, narrow, captured),
    }
    shape = MODELS[name](Scale("meta", scale.tiny)).shape
    return Case(
        f"weighted step, {name}" + (", CUDA graph" if captured else ""),
        *(shape, "bfloat16, autocast" if narrow else "float32", lambda: kept()[0].batch(), ways),
        targets=(Target("<= 1.45 plain steps", times=1.45, against=PLAIN),),
        asks_ahead=False,
        most_sets=1,
    )


def _training(build: Callable[[Scale], Training], scale: Scale) -> tuple[Training, dict[str, Tensor]]:
    training = build(scale)
    return training, {name: torch.randn_like(p) for name, p in training.model.named_parameters()}


def _call(step: Any, kept: Any, scale: Scale, narrow: bool, captured: bool, batch: Any) -> Call:
    training, direction = kept()

    def call() -> None:
        training.model.zero_grad(set_to_none=True)
        autocast: AbstractContextManager[Any] = nullcontext()
        if narrow:
            autocast = torch.autocast(scale.device, dtype=torch.bfloat16, cache_enabled=not captured)
        with autocast:
            step(training, direction, batch)

    return graph_of(call, scale.device) if captured else call


def _plain(training: Training, direction: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> None:
    training.loss(training.model(batch[0]), batch[1]).mean().backward()


def _weighted(training: Training, direction: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> None:
    weighted_step(training.model, batch, weight_fn=sigmoid_weights, direction=direction, loss=training.loss)


def influence_cases(scale: Scale) -> list[Case]:
    """Weights of a training batch, from the model on: this library, torch.func, matrix products, a naive loop."""
    N, width = (24, 8) if scale.tiny else (2048, 512)
    damping, tol = 0.1, 1e-2

    @functools.cache
    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        return nn.Sequential(*layers).to(scale.device)

    def inputs() -> dict[str, tuple[Tensor, Tensor]]:
        def samples(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, 64, device=scale.device)
            return x, x[:, :10].argmax(1)

        return {"batch": samples(N), "val": samples(N // 4)}

    def ours(x: dict[str, Any]) -> Call:
        return lambda: influence_weights(model(), x["batch"], x["val"], damping=damping, tol=tol)

    def others(scores: Callable[..., Tensor], **options: Any) -> Callable[[dict[str, Any]], Call]:
        def prepare(x: dict[str, Any]) -> Call:
            options_of_all = {"damping": damping, "tol": tol, **options}
            return lambda: sigmoid_weights(scores(model(), x["batch"], x["val"], **options_of_all))

        return prepare

    return [
        Case(
            *("influence weights", f"64-{width}-{width}-10, N {N}, CG to {tol:g}", "float32", inputs),
            {
                "kdaif_fast": ours,
                "torch.func": others(func_influence_scores),
                "plain matrix products, MLPs only": others(plain_influence_scores),
                "naive loop": others(naive_influence_scores, batch_size=256, curvature="ggn"),
            },
            right="torch.func",
            tolerance=0.05,  # each stops when its residual is 1 %
            targets=tuple(
                Target(f"faster than {text}", times=1.0, against=way)
                for text, way in (("the naive loop", "naive loop"), ("torch.func", "torch.func"))
            ),
            asks_ahead=False,
            most_sets=1,
        )
    ]


class Loop:
    """A distiller with data to go round and round: one step after the other, along a direction that is there."""

    def __init__(self, mechanism: str, scale: Scale, N: int, width: int) -> None:
        torch.manual_seed(0)

        def network() -> nn.Module:
            layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
            return nn.Sequential(*layers).to(scale.device)

        def batch() -> tuple[Tensor, Tensor]:
            return torch.randn(N, 64, device=scale.device), torch.randint(10, (N,), device=scale.device)

        self.distiller = Distiller(
            network(),
            network(),
            torch.optim.Adam,
            torch.optim.Adam,
            mechanism=mechanism,
            refresh="step",
            warmup_epochs=0,
            influence={"damping": 0.1, "tol": None, "max_iter": 10},
            solve_samples=N,
            progress=False,
        )
        self.batches = list(self.distiller.prepare([batch() for _ in range(4)], batch()))
        self.distiller.start_epoch(0)

    def step(self) -> None:
        """Train on the next batch."""
        self.distiller.step(self.batches[self.distiller.steps % len(self.batches)])


def distillation_cases(scale: Scale) -> list[Case]:
    """A step of both networks: mechanism M3, weights in every step, against the same without weights."""
    N, width = (8, 16) if scale.tiny else (1024, 512)
    kept = functools.cache(lambda mechanism: Loop(mechanism, scale, N, width))
    return [
        Case(
            *("distillation step, M3", f"64-{width}-{width}-10, N {N}", "float32", lambda: ()),
            {
                PLAIN: lambda _: unchecked(kept("online").step),
                "kdaif_fast": lambda _: unchecked(kept("M3").step),
            },
            asks_ahead=False,
            most_sets=1,
        )
    ]
