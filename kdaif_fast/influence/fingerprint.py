"""What scores depend on, in a form that can be written down and compared with that of another run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .._data import Batches, size_of


def describe(value: Any) -> Any:
    """Numbers and strings as they are; functions, tensors and everything else as text without addresses."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {digest([value])}"
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        return {"function": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{value.__module__}.{name}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    text = repr(value)
    return kind if " at 0x" in text else f"{kind}: {text}"


def of_model(model: nn.Module) -> str:
    """Of all values of its parameters and buffers, and their names."""
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return digest(list(state.values()), *state)


def of_data(batches: Batches) -> dict[str, Any]:
    """Of the first batch: its size and its values."""
    for _, batch in batches:
        leaves, form = tree_flatten(tuple(batch))
        return {
            "samples of the first batch": size_of(batch),
            "first batch": digest([leaf for leaf in leaves if isinstance(leaf, Tensor)], str(form)),
        }
    raise AssertionError("an empty loader raises by itself")


def digest(tensors: list[Tensor], *words: str) -> str:
    """Sixteen hexadecimal digits that other values, dtypes, shapes or words would change."""
    sha = hashlib.sha256()
    for word in words:
        sha.update(word.encode() + b"\0")
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        flat = dense.cpu().contiguous().reshape(-1).resolve_conj().resolve_neg()
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs, in words; entries of mappings one by one."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        name = f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}: ")
        elif a != b:
            found.append(f"{name} was {a!r} and is {b!r}")
    return found
