"""From a checked config to a Distiller with its data, tried out on a few samples before anything is trained."""

from __future__ import annotations

import importlib.util
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..._config import ConfigError, Importer, to_device, told
from ..._model import DistillationLoss, Loss, run_model, sample_losses
from ...influence import influence_scores
from ...ops import row_stats
from ..distiller import Distiller
from ..indexed import as_batch, on_device
from ..label_revision import label_revision
from ..mechanisms import MECHANISMS
from ..modes import device_of, evaluating
from ..rules import WeightRule, checked_weights, make_rule
from ..runs.random_states import random_state, set_random_state
from ..statistics import SampleStatistics
from ..taught import taught
from .data import Loaded, load_data
from .networks import build_function, build_model, build_optimizer, build_scheduler, device_of_run
from .reading import DISTILL, INFLUENCE, MEASURE, RUN, Config

TRIED = 8
"""Samples that everything is tried out on."""


@dataclass(frozen=True)
class Assembled:
    """All that a run needs."""

    distiller: Distiller
    data: Loaded
    train: Any  # with indices


@dataclass(frozen=True)
class _NamedRule:
    """A rule that a file names; what it is called tells checkpoints whether it is the same."""

    name: str
    settings: tuple[tuple[str, Any], ...]
    rule: WeightRule

    def __call__(self, stats: SampleStatistics, phi: Tensor, epoch: int) -> Tensor:
        return self.rule(stats, phi, epoch)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings)})"


def assemble(config: Config, progress: bool | None = None) -> Assembled:
    """Import, load, build and try out everything that the config names; nothing is written.

    Sets the random states of torch, NumPy and Python by run.seed.

    Args:
        config: of read_config.
        progress: of the Distiller.

    Raises:
        ConfigError: what does not fit; the message names the key.
    """
    path, run = config.path, config.run
    importer = Importer(path)
    device = device_of_run(config)
    _require_packages(config)
    _seed(run.seed)
    data = load_data(config.data, importer, run.seed, pin_memory=device.startswith("cuda"))
    models = []
    for at, options in enumerate((config.teacher, config.student)):
        torch.manual_seed(run.seed + at)  # a student is the same beside any teacher
        models.append(build_model(options, importer, data))
    teacher, student = models
    to_device(path, "run.device", device, teacher, student)
    trains_teacher = MECHANISMS[config.mechanism].trains_teacher
    is_taught = trains_teacher or run.teacher_epochs > 0
    teacher_epochs = run.teacher_epochs + (run.epochs if trains_teacher else 0)
    teacher_optimizer = build_optimizer(config.teacher, teacher, path) if is_taught else None
    student_optimizer = build_optimizer(config.student, student, path)
    try:
        distiller = Distiller(
            teacher,
            student,
            teacher_optimizer,
            student_optimizer,
            **_losses_and_rule(config, importer),
            teacher_scheduler=build_scheduler(config.teacher, teacher_optimizer, teacher_epochs, path),
            student_scheduler=build_scheduler(config.student, student_optimizer, run.epochs, path),
            clip_norm=run.clip_norm,
            accumulate=run.accumulate,
            autocast=torch.bfloat16 if run.precision == "bfloat16" else None,
            run_dir=run.folder,
            checkpoint_every=run.checkpoint_every,
            progress=progress,
            tensorboard=run.tensorboard,
            facts=data.facts,
            seed=run.seed,
        )
        train = distiller.prepare(data.train, data.validation)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{path}: {_with_key(str(error))}") from error
    _try_out(config, distiller, data)
    _seed(run.seed)
    return Assembled(distiller, data, train)


def _losses_and_rule(config: Config, importer: Importer) -> dict[str, Any]:
    """The arguments of Distiller that say what is learned."""
    options = dict(config.distill)
    temperature, alpha = options.pop("temperature"), options.pop("alpha")
    if config.teacher_loss is not None:
        options["teacher_loss"] = build_function(config.teacher_loss, importer, "a function (outputs, targets) -> [n]")
    if config.preset is not None:
        settings = config.preset.settings
        try:
            return {**label_revision(**settings, **options, mechanism=config.mechanism)}
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{config.path}: distill.preset: {error}") from error
    loss: Loss = DistillationLoss(temperature or 1.0, 0.5 if alpha is None else alpha)
    if config.loss is not None:
        loss = build_function(config.loss, importer, "a function (outputs, targets[, teacher_logits]) -> [n]")
    named = config.rule
    rule: WeightRule
    if ":" in named.name:
        own = build_function(named, importer, "a function (stats, phi, epoch) -> weights")
        rule = _NamedRule(named.name, tuple(sorted(named.settings.items())), own)
    else:
        rule = make_rule(named.name, **named.settings)
    return {**options, "loss": loss, "rule": rule, "mechanism": config.mechanism}


def _try_out(config: Config, distiller: Distiller, data: Loaded) -> None:
    """Run a few samples through networks, losses, influence and rule, so that what does not fit shows before training.

    Random states are left as they were, and so are the networks.
    """
    before, own = random_state(), getattr(data.train, "generator", None)
    own_state = None if own is None else own.get_state()
    student, teacher = distiller.student, distiller.teacher
    device = device_of(student)
    try:
        with evaluating(student, teacher), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = taught(_few(next(iter(data.train))), teacher, device)
            with _told(config, "teacher.model"):
                outputs = run_model(teacher, batch.inputs, "the first training samples")
            with _told(config, "distill.teacher_loss" if config.teacher_loss else "teacher.model"):
                sample_losses(distiller.teacher_loss, outputs, batch._replace(teacher_logits=None), "them")
            with _told(config, "student.model"):
                outputs = run_model(student, batch.inputs, "the first training samples")
            with _told(config, "distill.loss" if config.loss else "student.model"):
                losses = sample_losses(distiller.loss, outputs, batch, "them")
            if MECHANISMS[config.mechanism].weighs:
                few = on_device(as_batch(_few(next(iter(data.validation)))), device)
                phi = _tried_scores(config, distiller, batch, few)
                stats = SampleStatistics(
                    torch.arange(len(phi)),
                    batch.targets,
                    phi,
                    torch.Generator().manual_seed(0),
                    rows=lambda: row_stats(outputs.detach(), batch.teacher_logits, batch.targets),
                    losses=losses.detach,
                )
                with _told(config, "distill.rule"):
                    checked_weights(distiller.rule(stats, phi, 0), phi)
    finally:
        set_random_state(before)
        if own is not None:
            own.set_state(own_state)


def _tried_scores(config: Config, distiller: Distiller, batch: Any, few: Any) -> Tensor:
    """Phi of the batch, roughly: what matters is that it can be measured."""
    options = {"tol": None, **config.distill["influence"], "max_iter": 2}
    if config.distill["params"] is not None:
        options["params"] = config.distill["params"]
    try:
        return influence_scores(distiller.student, batch, few, loss=distiller.loss, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{config.path}: {_with_key(str(error))}") from error


def _with_key(message: str) -> str:
    """An error that begins with the name of an argument, with the key of the file instead."""
    word = re.match(r"(\w+)", message)
    name = word[1] if word else ""
    for section, keys in (("influence", (*INFLUENCE, *MEASURE)), ("distill", DISTILL), ("run", RUN)):
        if name in keys:
            return f"{section}.{message}"
    return message


@contextmanager
def _told(config: Config, key: str) -> Iterator[None]:
    """Whatever is raised within becomes a ConfigError that names the key."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # networks, losses and rules are anybody's
        raise ConfigError(f"{config.path}: {key} failed on the first samples: {told(error)}") from error


def _few(given: Any) -> Any:
    """The first samples of a batch."""
    batch = as_batch(given)
    size = len(batch.targets)
    few = tree_map(lambda x: x[:TRIED] if isinstance(x, Tensor) and x.dim() and len(x) == size else x, tuple(batch))
    return tuple(part for part in few if part is not None)


def _require_packages(config: Config) -> None:
    """Raise ConfigError for a missing package before hours are spent."""
    wanted = {"safetensors": "run.dir", **({"tensorboard": "run.tensorboard"} if config.run.tensorboard else {})}
    wanted |= {"jinja2": "run.dir", "matplotlib": "run.dir"}
    for name, key in wanted.items():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'{config.path}: {key} needs {name}: pip install {name} (or "kdaif-fast[train]")')


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
