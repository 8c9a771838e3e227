"""Other states of a model, put into it for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from .._model import plain_name

Checkpoint: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str] | Callable[[nn.Module], Any]"
"""A state dict, a file of one, or a function of the model that returns one or puts the model into a state itself."""


def read_checkpoints(checkpoints: Any) -> list[Checkpoint]:
    """Several checkpoints as a list. Raises TypeError, ValueError unless there is one at least."""
    if isinstance(checkpoints, (str, Mapping)) or not isinstance(checkpoints, Iterable):
        kind = type(checkpoints).__name__
        raise TypeError(f"checkpoints is a {kind}, expected a list of state dicts, files or functions")
    states = list(checkpoints)
    if not states:
        raise ValueError("checkpoints is empty: give at least one")
    return states


@contextlib.contextmanager
def keeps_state(model: nn.Module) -> Iterator[None]:
    """After it, however it ends, the model has the tensors, with their values, and the modes that it had before."""
    kept, values = [], {}
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        kept.append((module, module.training, [(own, dict(own)) for own in held]))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in values:
                values[id(tensor)] = tensor, tensor.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values.values():
                tensor.copy_(value)
        for module, training, tensors in kept:
            module.training = training
            for own, before in tensors:
                own.clear()
                own.update(before)


def at_checkpoint(model: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Put the model into a state; errors call it `name`.

    Raises:
        TypeError: something else than a state dict, a file or a function.
        ValueError: a state that does not fit the model.
        FileNotFoundError, ImportError: a file that is not there, or that needs the package safetensors.
    """
    state: Any
    if isinstance(checkpoint, Mapping):
        state = checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        state = _read(Path(checkpoint), name)
    elif callable(checkpoint):
        state = checkpoint(model)
        if state is None or isinstance(state, nn.Module):
            return
    else:
        kind = type(checkpoint).__name__
        raise TypeError(f"{name} is a {kind}, expected a state dict, the path of a file, or a function of the model")
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} gave a {type(state).__name__}, expected a state dict")
    own = {plain_name(str(key)): str(key) for key in model.state_dict()}
    renamed = {own.get(plain_name(str(key)), str(key)): value for key, value in state.items()}
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(
            f"{name} does not fit the model: {error}. Of a file that holds more than a state dict, give a function "
            "that returns it"
        ) from None


def _read(path: Path, name: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{name} is {str(path)!r}, where there is no file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f"{name} is {str(path)!r}, which needs safetensors: pip install safetensors") from None
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
