"""The networks that a config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from ..._config import ConfigError, Importer, load_weights, meant, require_known, told
from ..modes import unwrapped
from .data import Loaded
from .reading import OPTIMIZERS, SCHEDULERS, Config, ModelOptions, Named


def build_model(options: ModelOptions, importer: Importer, data: Loaded) -> nn.Module:
    """The network, with the weights of its checkpoint if there is one.

    A function gets the arguments of the file; and "classes" and "vocabulary" of the data, if it has parameters of these
    names which the file says nothing of.

    Raises:
        ConfigError: what cannot be imported, built or loaded; the message names the key.
    """
    path, key = importer.path, f"{options.key}.model"
    kind, _, name = options.model.partition(":")
    if kind == "torchvision":
        model = _of_torchvision(options, importer, name, data)
    elif kind == "transformers":
        model = _of_transformers(options, path, name, data)
    else:
        model = importer.call(key, options.model, options.arguments, classes=data.classes, vocabulary=data.vocabulary)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path}: {key} is {options.model!r}, which gave a {type(model).__name__}, expected a Module")
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"{path}: {key} is {options.model!r}, which has no parameters")
    if options.checkpoint is not None:
        load_weights(path, f"{options.key}.checkpoint", unwrapped(model), options.checkpoint)
    return model


def build_optimizer(options: ModelOptions, model: nn.Module, path: Path) -> optim.Optimizer:
    """The optimizer over the model's parameters that require grad."""
    named = options.optimizer
    try:
        made: optim.Optimizer = OPTIMIZERS[named.name](
            [p for p in model.parameters() if p.requires_grad], **named.settings
        )
        return made
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: {named.key}: {named.name} with {_shown(named)}: {error}") from error


def build_scheduler(
    options: ModelOptions, optimizer: optim.Optimizer | None, epochs: int, path: Path
) -> optim.lr_scheduler.LRScheduler | None:
    """The scheduler of the optimizer; a cosine ends with the training, if the file does not say where."""
    named = options.scheduler
    if named is None or optimizer is None:
        return None
    settings = dict(named.settings)
    if named.name == "CosineAnnealingLR":
        settings.setdefault("T_max", epochs)
    try:
        made: optim.lr_scheduler.LRScheduler = SCHEDULERS[named.name](optimizer, **settings)
        return made
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {named.key}: {named.name} with {_shown(named)}: {error}") from error


def build_function(named: Named, importer: Importer, what: str) -> Callable[..., Any]:
    """The function "module:name"; a class is called with the settings first, a function keeps them.

    Raises:
        ConfigError: what cannot be imported or called; the message names the key.
    """
    made = importer.function(named.key, named.name)
    if isinstance(made, type):
        made = importer.call(named.key, named.name, named.settings)
        if not callable(made):
            raise ConfigError(
                f"{importer.path}: {named.key} is {named.name!r}, which made a {type(made).__name__}, expected {what}"
            )
        return made
    return partial(made, **named.settings) if named.settings else made


def _of_torchvision(options: ModelOptions, importer: Importer, name: str, data: Loaded) -> nn.Module:
    path, key = importer.path, f"{options.key}.model"
    try:
        from torchvision import models
    except ImportError as error:
        raise ConfigError(f"{path}: {key} is {options.model!r}: pip install torchvision") from error
    if not callable(getattr(models, name, None)):
        close = meant(name, [known for known in dir(models) if known.islower()])
        raise ConfigError(f"{path}: {key} is {options.model!r}, but torchvision.models has no {name!r}{close}")
    arguments = dict(options.arguments)
    if data.classes is not None:
        arguments.setdefault("num_classes", data.classes)
    try:
        made: nn.Module = getattr(models, name)(**arguments)
        return made
    except Exception as error:  # whatever it may raise
        raise ConfigError(f"{path}: {key} is {options.model!r}, which failed: {told(error)}") from error


def _of_transformers(options: ModelOptions, path: Path, name: str, data: Loaded) -> nn.Module:
    """A model of a folder (weights, or, without any, config.json), or a new one of a type: "bert"."""
    key = f"{options.key}.model"
    try:
        import transformers
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError as error:
        raise ConfigError(f"{path}: {key} is {options.model!r}: pip install transformers") from error
    is_text = isinstance(data.inputs, Mapping)
    auto_name = options.auto or f"AutoModelFor{'Sequence' if is_text else 'Image'}Classification"
    auto = getattr(transformers, auto_name, None)
    if not auto_name.startswith("AutoModel") or auto is None:
        raise ConfigError(
            f"{path}: {options.key}.auto is {auto_name!r}, expected a class AutoModelFor... of transformers"
        )
    settings = dict(options.arguments)
    if data.classes is not None:
        settings.setdefault("num_labels", data.classes)
    folder = path.parent / name
    try:
        if folder.is_dir():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, **settings)
            if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
                made: nn.Module = auto.from_pretrained(str(folder), config=config, local_files_only=True)
                return made
        elif name in CONFIG_MAPPING_NAMES:
            if data.vocabulary is not None:
                settings.setdefault("vocab_size", data.vocabulary)
            config = AutoConfig.for_model(name, **settings)
            require_known(path, options.arguments, _settings_of(config), f"{options.key}.arguments.")
        else:
            raise ConfigError(
                f"{path}: {key} is {options.model!r}, but there is no folder {folder}, and no type of model that is "
                f"called so{meant(name, CONFIG_MAPPING_NAMES)}"
            )
        new: nn.Module = auto.from_config(config)
        return new
    except ConfigError:
        raise
    except Exception as error:  # whatever it may raise
        raise ConfigError(f"{path}: {key} is {options.model!r}, which cannot be built: {told(error)}") from error


def _settings_of(config: Any) -> set[str]:
    """The settings that a type of model has: it would take any others, and not look at them."""
    return {*type(config)().to_dict(), "num_labels", *getattr(config, "attribute_map", {})}


def _shown(named: Named) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in named.settings.items()) or "no settings"


def device_of_run(config: Config) -> str:
    """Where the file says the networks shall be, else the GPU if there is one."""
    return config.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
