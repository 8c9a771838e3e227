"""Influence scores of what a TOML file describes: the command `kdaif-fast scores`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._config import ConfigError, Importer, load_weights, read_toml, require_known, to_device
from .scores import influence_scores

EXAMPLE = """\
module = "project.py"           # a Python file (relative to this one), or a module's name
model = "make_model"            # functions without arguments in it (or the objects themselves)
train = "train_loader"          # a loader with shuffle=False, or one batch
val = "val_loader"
loss = "sample_losses"          # may be left out: cross-entropy, or distillation with a teacher
checkpoint = "model.pt"         # may be left out: a state dict, .pt or .safetensors
out = "scores.npy"              # .npy or .safetensors
device = "cpu"                  # may be left out: where the model shall be
top = 10                        # how many samples the summary names

[options]                       # of kdaif_fast.influence_scores, all of them may be left out
curvature = "ggn"
damping = "auto"
tol = "rank"                    # "none" spends max_iter products
queries = "mean"
"""

KEYS = ("module", "model", "train", "val", "loss", "checkpoint", "out", "device", "top", "options")
REQUIRED = ("module", "model", "train", "val", "out")

# What the file has keys of its own for, or the command line, or what makes no sense there.
_NO_OPTIONS = {"model", "batch", "val", "loss", "out", "return_solution", "progress", "group", "curvature_data"}
OPTIONS = tuple(sorted(set(inspect.signature(influence_scores).parameters) - _NO_OPTIONS))
FLAGS = ("keep_graphs", "resume", "strict")


def read_config(path: Path) -> dict[str, Any]:
    """The file's settings, checked for names and types; paths are relative to the file's folder.

    Raises ConfigError, naming the key.
    """
    config = read_toml(path)
    require_known(path, config, KEYS)
    for key in REQUIRED:
        if key not in config:
            raise ConfigError(f"{path}: the key {key!r} is missing")
    for key in set(KEYS) - {"top", "options"}:
        if not isinstance(config.get(key, ""), str):
            raise ConfigError(f"{path}: {key} is {config[key]!r}, expected text")
    top = config.setdefault("top", 10)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise ConfigError(f"{path}: top is {top!r}, expected a number >= 0")
    options = config.setdefault("options", {})
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: options is {options!r}, expected a table [options]")
    require_known(path, options, OPTIONS, "options.")
    for key in FLAGS:
        if not isinstance(options.get(key, False), bool):
            raise ConfigError(f"{path}: options.{key} is {options[key]!r}, expected true or false")
    if options.get("tol") == "none":
        options["tol"] = None
    for key in ("out", "checkpoint"):
        if key in config:
            config[key] = str(path.parent / config[key])
    return config


def scores_from_config(
    path: Path, *, resume: bool = True, progress: bool | None = None, say: Callable[[str], object] = print
) -> Tensor:
    """Read the file, compute the scores and write them to its `out`; tell the most harmful and helpful samples.

    Args:
        path: a TOML file, see EXAMPLE.
        resume: whether to go on with what a run before has left at `out`.
        progress: show progress bars; None shows them on a terminal only.
        say: where the summary goes, line by line.

    Returns:
        phi, as influence_scores has it.

    Raises:
        ConfigError: a file that cannot be read, or a key that does not fit.
        As influence_scores.
    """
    config = read_config(path)
    module = Importer(path).module("module", config["module"])
    model = _get(path, module, "model", config)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path}: model gave a {type(model).__name__}, expected a torch.nn.Module")
    if "checkpoint" in config:
        load_weights(path, "checkpoint", model, Path(config["checkpoint"]))
    if "device" in config:
        to_device(path, "device", config["device"], model)
    train, val = (_get(path, module, key, config) for key in ("train", "val"))
    phi, solution = influence_scores(
        model,
        train,
        val,
        loss=_get(path, module, "loss", config, call=False) if "loss" in config else None,
        out=config["out"],
        progress=progress,
        return_solution=True,
        **{"resume": resume, **config["options"]},
    )
    residual = float(torch.as_tensor(solution.residual).max())
    say(f"{len(phi)} samples, {1 if phi.dim() == 1 else phi.shape[1]} losses asked about")
    say(f"damping {solution.damping:.4g}, relative residual {residual:.2g}, {solution.iterations} products")
    mean = phi if phi.dim() == 1 else phi.mean(1)
    order = mean.argsort().tolist()
    say(f"most harmful: {_named(order[::-1], mean, config['top'], 1)}")
    say(f"most helpful: {_named(order, mean, config['top'], -1)}")
    say(f"written to {config['out']}")
    return phi


def _named(order: list[int], phi: Tensor, top: int, sign: int) -> str:
    named = [f"{i} ({phi[i]:+.3g})" for i in order[:top] if sign * phi[i] > 0]
    return ", ".join(named) or "none"


def _get(path: Path, module: ModuleType, key: str, config: Mapping[str, Any], call: bool = True) -> Any:
    """What the module has under the name that a key gives; functions are called."""
    name = config[key]
    if not hasattr(module, name):
        raise ConfigError(f"{path}: {key} is {name!r}, which {module.__name__} does not have")
    value = getattr(module, name)
    is_function = inspect.isroutine(value) or inspect.isclass(value)
    return value() if call and is_function else value
