"""What a TOML file says of a distillation: read, and checked for keys, types, names and files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import optim

from ..._config import REQUIRED, ConfigError, Section, meant, parse_toml, read_toml, require_known
from ...curvature import CURVATURES
from ...solvers import SOLVERS
from ..mechanisms import MECHANISMS
from ..rules import RULES, make_rule
from ..weight_book import COMBINATIONS
from .data import DataOptions, read_data

EXAMPLE = """\
[data]
kind = "digits"                 # or "torchvision", "datasets", "function"
flip = 0.2                      # share of training labels to make wrong, to see whether they are found
batch_size = 64

[teacher]
model = "kdaif_fast.demo.models:cnn"     # or "file.py:name", "torchvision:resnet18", "transformers:folder"
arguments = { width = 32 }

[student]
model = "kdaif_fast.demo.models:cnn"
arguments = { width = 8 }

[student.optimizer]             # of torch.optim; the teacher has its own
name = "Adam"
lr = 2e-3

[distill]                       # arguments of kdaif_fast.distill.Distiller
mechanism = "M3"
rule = "sigmoid"
warmup_epochs = 2

[run]
dir = "runs/digits"             # relative to this file; a run that was stopped goes on there
epochs = 20
"""

SECTIONS = ("data", "teacher", "student", "distill", "influence", "run")
MODEL = ("model", "arguments", "checkpoint", "optimizer", "scheduler", "auto")
DISTILL = (
    *("mechanism", "rule", "preset", "refresh", "warmup_epochs", "ema", "combine", "normalize"),
    *("temperature", "alpha", "loss", "teacher_loss"),
)
INFLUENCE = ("curvature", "solver", "damping", "tol", "max_iter", "solver_options", "keep_graphs", "memory")
MEASURE = ("solve_samples", "solve_every", "batch_size", "params")
RUN = (
    *("dir", "epochs", "teacher_epochs", "checkpoint_every", "seed", "device", "precision", "threads"),
    *("tensorboard", "clip_norm", "accumulate"),
)
PRESETS = {"label_revision": ("share", "eta", "temperature", "ce_weight", "kd_weight")}
PRECISIONS = ("float32", "bfloat16")

# Those that a step with one gradient, and TOML, can do: no closures, no functions, no other schedulers.
OPTIMIZERS = {
    name: found
    for name, found in vars(optim).items()
    if isinstance(found, type) and issubclass(found, optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}
SCHEDULERS = {
    name: found
    for name, found in vars(optim.lr_scheduler).items()
    if isinstance(found, type)
    and issubclass(found, optim.lr_scheduler.LRScheduler)
    and not name.startswith("_")
    and name
    not in ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
}


@dataclass(frozen=True)
class Named:
    """Something that has a name, and settings."""

    key: str  # of the file, which names it
    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class ModelOptions:
    """A network, with what trains it."""

    key: str  # "teacher" or "student"
    model: str
    arguments: dict[str, Any]
    auto: str | None
    checkpoint: Path | None
    optimizer: Named
    scheduler: Named | None


@dataclass(frozen=True)
class RunOptions:
    """Where and how long."""

    folder: Path
    epochs: int
    teacher_epochs: int
    checkpoint_every: int | None
    seed: int
    device: str | None
    precision: str
    threads: int | None
    tensorboard: bool
    clip_norm: float | None
    accumulate: int


@dataclass(frozen=True)
class Config:
    """What the file says, checked; `resolved` is all of it, defaults too, as plain values."""

    path: Path
    data: DataOptions
    teacher: ModelOptions
    student: ModelOptions
    mechanism: str
    rule: Named
    preset: Named | None
    loss: Named | None
    teacher_loss: Named | None
    distill: dict[str, Any]  # further arguments of Distiller
    run: RunOptions
    resolved: dict[str, Any]


def read_config(path: Path, changes: Sequence[str] = (), out: Path | None = None) -> Config:
    """The file's settings, checked as far as that needs no import and no data.

    Args:
        path: a TOML file; other files that it names are relative to its folder.
        changes: "section.key=value", in place of what the file has; values as in the file, or bare text.
        out: in place of run.dir, relative to where the command was called.

    Raises:
        ConfigError: what cannot be used; the message names the key.
    """
    tables = read_toml(path)
    for change in changes:
        _apply(path, tables, change)
    whole = Section(path, "", tables, SECTIONS)
    for name in ("data", "teacher", "student"):
        if name not in whole:
            raise ConfigError(f"{path}: the table [{name}] is missing")
    run_section = whole.table("run", RUN)
    run = _read_run(run_section, path, out)
    distill = whole.table("distill", DISTILL)
    mechanism = distill.choice("mechanism", MECHANISMS, "M1" if "preset" in distill else "M3")
    preset = _read_preset(distill)
    rule, loss = _read_rule(distill, preset), _read_loss(distill, preset)
    teacher_loss = _read_function(distill, "teacher_loss")
    options = _read_distill(distill, preset is not None)
    options |= _read_influence(whole.table("influence", (*INFLUENCE, *MEASURE)))
    options |= {"temperature": distill.resolved.get("temperature"), "alpha": distill.resolved.get("alpha")}
    teacher, student = (_read_model(whole.table(name, MODEL)) for name in ("teacher", "student"))
    _require_taught(path, mechanism, teacher, run_section)
    return Config(
        path=path,
        data=read_data(whole.table("data")),
        teacher=teacher,
        student=student,
        mechanism=mechanism,
        rule=rule,
        preset=preset,
        loss=loss,
        teacher_loss=teacher_loss,
        distill=options,
        run=run,
        resolved=whole.resolved,
    )


def _apply(path: Path, tables: dict[str, Any], change: str) -> None:
    """Put "section.key=value" into the tables."""
    name, equals, text = change.partition("=")
    *sections, key = (part.strip() for part in name.split("."))
    if not equals or not key or not sections or not all(sections):
        raise ConfigError(f"{path}: the change is {change!r}, expected 'section.key=value'")
    table = tables
    for at, section in enumerate(sections):
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {'.'.join(sections[: at + 1])} is {table!r}, so that {name} cannot be set")
    try:
        table[key] = parse_toml(f"value = {text}")["value"]
    except ValueError:
        table[key] = text.strip()


def _read_run(run: Section, path: Path, out: Path | None) -> RunOptions:
    if out is not None:
        run.given["dir"] = str(out)
    folder = Path(run.text("dir", str(Path("runs") / path.stem)))
    folder = folder if out is not None else path.parent / folder
    if folder.exists() and not folder.is_dir():
        raise run.wrong("dir", f"but {folder} is a file")
    device = run.text("device", None)
    return RunOptions(
        folder=folder,
        epochs=run.integer("epochs", least=1),
        teacher_epochs=run.integer("teacher_epochs", 0),
        checkpoint_every=run.integer("checkpoint_every", None, least=1),
        seed=run.integer("seed", 0),
        device=device,
        precision=run.choice("precision", PRECISIONS, "float32"),
        threads=run.integer("threads", None, least=1),
        tensorboard=run.flag("tensorboard"),
        clip_norm=run.number("clip_norm", "a number > 0", None, 0),
        accumulate=run.integer("accumulate", 1, least=1),
    )


def _read_distill(distill: Section, has_preset: bool) -> dict[str, Any]:
    """The keys that are arguments of Distiller just as they are."""
    refresh = distill.value("refresh", "epoch")
    if refresh not in ("epoch", "step") and (type(refresh) is not int or refresh < 1):
        raise distill.wrong(
            "refresh", f"expected 'epoch', 'step', or a number of steps >= 1{meant(refresh, ('epoch', 'step'))}"
        )
    return {
        "refresh": refresh,
        "warmup_epochs": distill.integer("warmup_epochs", 2),
        "ema": distill.number("ema", "a number in [0, 1)", 0.0 if has_preset else 0.5, 0, 1),
        "combine": distill.choice("combine", COMBINATIONS, "mean"),
        "normalize": distill.flag("normalize"),
    }


def _read_influence(influence: Section) -> dict[str, Any]:
    """The arguments of Distiller that say how influence is measured; only what the file has of influence_scores'."""
    options: dict[str, Any] = {}
    for key, names in (("curvature", CURVATURES), ("solver", SOLVERS)):
        if key in influence:
            options[key] = influence.choice(key, names)
    for key in ("damping", "tol"):
        word = {"damping": ("auto",), "tol": ("rank", "none")}[key]
        if key in influence:
            options[key] = influence.value(key)
            if options[key] not in word:
                expected = f"a number >= 0, or {' or '.join(map(repr, word))}"
                options[key] = influence.number(key, expected, None, 0)
    if options.get("tol") == "none":
        options["tol"] = None
    for key, least in (("max_iter", 1), ("memory", 1)):
        if key in influence:
            options[key] = influence.integer(key, least=least)
    if "keep_graphs" in influence:
        options["keep_graphs"] = influence.flag("keep_graphs")
    if "solver_options" in influence:
        options["solver_options"] = influence.settings("solver_options")
    return {
        "influence": options,
        "solve_samples": influence.integer("solve_samples", 2048, least=1),
        "solve_every": influence.integer("solve_every", 1, least=1),
        "batch_size": influence.integer("batch_size", None, least=1),
        "params": influence.texts("params", None),
    }


def _read_preset(distill: Section) -> Named | None:
    """The preset: a name, or a table with a name and settings."""
    if "preset" not in distill:
        return None
    named = _named(distill, "preset", tuple(PRESETS), "")
    for key in ("rule", "loss", "temperature", "alpha"):
        if key in distill:
            raise distill.wrong(key, f"but distill.preset is {named.name!r}, which says what it is")
    table = Section(distill.path, named.key, named.settings, PRESETS[named.name])
    for key in PRESETS[named.name]:
        table.number(key, "a number >= 0", None, 0)
    return named


def _read_rule(distill: Section, preset: Named | None) -> Named:
    """The rule: a name in RULES or "module:name", alone or in a table with settings."""
    if preset is not None:
        return Named("distill.preset", preset.name, {})
    named = _named(distill, "rule", tuple(RULES), "sigmoid")
    if ":" not in named.name:
        known = {field.name: field.default is MISSING for field in fields(RULES[named.name])}
        require_known(distill.path, named.settings, known, "distill.rule.")
        for key, is_needed in known.items():
            if is_needed and key not in named.settings:
                raise ConfigError(
                    f"{distill.path}: distill.rule is {named.name!r}, whose setting {key!r} is missing: expected "
                    f'rule = {{ name = "{named.name}", {key} = ... }}'
                )
        try:
            make_rule(named.name, **named.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{distill.path}: distill.rule.{error}") from error
    return named


def _read_loss(distill: Section, preset: Named | None) -> Named | None:
    """The student's loss, if it is a function; else its temperature and alpha are read."""
    if preset is not None:
        return None
    if "loss" not in distill:
        distill.number("temperature", "a finite number > 0", 1.0, 0)
        distill.number("alpha", "a number in [0, 1]", 0.5, 0, 1)
        return None
    for key in ("temperature", "alpha"):
        if key in distill:
            raise distill.wrong(key, f"but distill.loss is {distill.given['loss']!r}, which says what the loss is")
    return _read_function(distill, "loss")


def _read_function(section: Section, key: str) -> Named | None:
    """A function "module:name", alone or in a table with settings; None without the key."""
    return _named(section, key, (), "") if key in section else None


def _read_model(section: Section) -> ModelOptions:
    section.resolved["arguments"] = {}
    model = section.text("model")
    if ":" not in model:
        raise section.wrong(
            "model", "expected 'module:name', 'file.py:name', 'torchvision:name' or 'transformers:folder or type'"
        )
    auto = section.text("auto", None)
    if auto is not None and not model.startswith("transformers:"):
        raise section.wrong("auto", "which is for models of transformers only")
    return ModelOptions(
        key=section.name,
        model=model,
        arguments=section.settings("arguments"),
        auto=auto,
        checkpoint=section.path_to("checkpoint", None),
        optimizer=_read_part(section, "optimizer", OPTIMIZERS, {"name": "Adam"}),
        scheduler=_read_part(section, "scheduler", SCHEDULERS, None) if "scheduler" in section else None,
    )


def _read_part(section: Section, key: str, known: Mapping[str, type], default: dict[str, Any] | None) -> Any:
    """An optimizer or scheduler: a table with a name and the settings of that class."""
    if default is not None:
        section.given.setdefault(key, default)
    named = _named(section, key, tuple(known), "Adam" if key == "optimizer" else REQUIRED, may_be_function=False)
    parameters = tuple(inspect.signature(known[named.name]).parameters)[1:]  # without the first: what it is of
    require_known(section.path, named.settings, parameters, f"{named.key}.")
    return replace(named, settings={name: _as_python(value) for name, value in named.settings.items()})


def _named(section: Section, key: str, known: tuple[str, ...], default: Any, *, may_be_function: bool = True) -> Named:
    """A name, or a table with a name and settings."""
    label = section.label(key)
    value = section.value(key, default)
    if isinstance(value, Mapping):
        inner = section.table(key)
        name = inner.text("name", default if default else REQUIRED)
        settings = {setting: given for setting, given in inner.given.items() if setting != "name"}
        inner.resolved.update(settings)
        label_of_name = inner.label("name")
    else:
        name, settings, label_of_name = value, {}, label
    is_function = may_be_function and isinstance(name, str) and ":" in name
    if not isinstance(name, str) or not (is_function or name in known):
        choices = [*known, *(["'module:function'"] if may_be_function else [])]
        expected = f"expected one of {', '.join(choices)}" if known else "expected 'module:function'"
        raise ConfigError(f"{section.path}: {label_of_name} is {name!r}, {expected}{meant(name, known)}")
    return Named(label, name, settings)


def _as_python(value: Any) -> Any:
    """Lists as the tuples that torch.optim has: betas."""
    return tuple(value) if isinstance(value, list) and all(isinstance(one, float) for one in value) else value


def _require_taught(path: Path, mechanism: str, teacher: ModelOptions, run: Section) -> None:
    """A teacher that is fixed must have learned something, somewhere."""
    if MECHANISMS[mechanism].trains_teacher or teacher.checkpoint is not None or "teacher_epochs" in run:
        return
    if not teacher.model.startswith("transformers:"):
        raise ConfigError(
            f"{path}: distill.mechanism is {mechanism!r}, whose teacher is not trained: expected teacher.checkpoint, "
            "or run.teacher_epochs, for how long it is trained before (0 if it comes trained)"
        )
