"""What scores depend on, in a form that can be written down and compared with that of another run."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .._data import Batches, size_of

DEEPEST = 4
"""How many objects inside of each other are looked into."""


def describe(value: Any, depth: int = 0) -> Any:
    """Numbers and strings as they are; all else as text without addresses, which differs where they may compute else.

    Of functions: name, code, defaults, and the variables from around them (a lambda has the same name after it was
    changed); of modules: layers, values and attributes; of other objects: attributes. What a function finds in its
    module by name is not looked at.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {digest([value])}"
    if depth > DEEPEST:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return {
            str(key): describe(item, depth + 1) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))
        }
    if isinstance(value, (list, tuple)):
        return [describe(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(describe(item, depth + 1)) for item in value)
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return describe(parts, depth)
    if isinstance(value, types.MethodType):
        return describe({"function": value.__func__, "of": value.__self__}, depth)
    if isinstance(value, types.FunctionType):
        around = [value.__defaults__, value.__kwdefaults__, *map(_content, value.__closure__ or ())]
        words = *_code(value.__code__), str(describe(around, depth + 1))
        return f"{value.__module__}.{value.__qualname__} {digest([], *words)}"
    name = getattr(value, "__qualname__", None)
    return _object(value, depth) if name is None else f"{value.__module__}.{name}"


def _object(value: Any, depth: int) -> str:
    kind, text = f"{type(value).__module__}.{type(value).__qualname__}", repr(value)
    words = [kind if " at 0x" in text else f"{kind}: {text}"]
    if isinstance(value, nn.Module):
        inner = [vars(module) for module in value.modules()]
        public = [{key: item for key, item in own.items() if not key.startswith("_")} for own in inner]
        words.append(digest([], of_model(value), structure(value), str(describe(public, depth))))
    elif getattr(value, "__dict__", None):
        words.append(digest([], str(describe(vars(value), depth + 1))))
    return " ".join(words)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: types.CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield str(code.co_names)
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from _code(item)
        else:
            yield str(describe(item))


def structure(model: nn.Module) -> str:
    """Of the kinds and settings of its layers: two models with the same values may still compute different things."""
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    return digest([], *(f"{type(module).__qualname__}({module.extra_repr()})" for module in leaves))


def of_model(model: nn.Module) -> str:
    """Of all values of its parameters and buffers, and their names."""
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return digest(list(state.values()), *state)


def of_data(batches: Batches) -> dict[str, Any]:
    """Of all batches: how many samples there are, and their values. One pass, without the model."""
    samples, first, sha = 0, 0, hashlib.sha256()
    for _, batch in batches:
        leaves, form = tree_flatten(tuple(batch))
        first = first or size_of(batch)
        samples += size_of(batch)
        words = [repr(leaf) for leaf in leaves if isinstance(leaf, (bool, int, float, str))]
        sha.update(digest([leaf for leaf in leaves if isinstance(leaf, Tensor)], str(form), *words).encode())
    return {"samples of the first batch": first, "number of samples": samples, "values": sha.hexdigest()[:16]}


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
