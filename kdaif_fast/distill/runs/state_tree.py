"""Trees of tensors and plain values, taken apart into tensors by name and a structure for JSON, and put together."""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

KINDS = (
    "tensors, arrays and numbers of numpy, dictionaries, lists, tuples, numbers, strings, bytes, bools, None, "
    "torch.Size, torch.dtype and torch.device"
)

_FILED_AS_THEY_ARE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""Dtypes that every version of the file format knows; others are filed as bytes."""

_LISTS: dict[str, type] = {"tuple": tuple, "size": torch.Size}
_MAPPINGS: dict[str, type] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_KEYS = (str, int, float, bool, type(None), tuple)
_NUMERIC = "biufc"  # numpy's letters: bool, int, unsigned, float, complex


def take_apart(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """(structure, tensors): what JSON can hold, and dense, contiguous tensors on the CPU that do not overlap.

    JSON's objects {kind: ...} stand for all that JSON has no notion of; {"tensor": name} for a tensor. Tensors that
    are the same view of the same memory (tied parameters) are taken once. What is contiguous, up to a permutation of
    its dimensions, and on the CPU is not copied.

    Raises:
        TypeError: a value that is none of KINDS, or a tensor that is not dense; says where it is in the tree.
    """
    parts = _Parts()
    return parts.structure(state, ()), parts.tensors


def put_together(structure: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The tree that take_apart was given; `tensor` finds a tensor by its name.

    Raises KeyError, TypeError, ValueError for a structure that take_apart cannot have made.
    """
    return _Whole(tensor).value(structure)


class _Parts:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._nodes: dict[tuple[Any, ...], Any] = {}  # of tensors that were met, by the memory they show
        self._taken: dict[int, list[tuple[int, int]]] = {}  # addresses in use, by storage

    def structure(self, value: Any, keys: tuple[Any, ...]) -> Any:
        import numpy as np

        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, keys)
        if kind is list:
            return [self.structure(item, (*keys, i)) for i, item in enumerate(value)]
        for name, of in _LISTS.items():
            if kind is of:
                return {name: [self.structure(item, (*keys, i)) for i, item in enumerate(value)]}
        for name, of in _MAPPINGS.items():
            if kind is of:
                return {name: self._items(value, keys), **self._versions(value, keys)}
        if isinstance(value, np.generic) and value.dtype.kind in _NUMERIC:
            return {"number": [value.dtype.str, value.tobytes().hex()]}
        if kind is np.ndarray and value.dtype.kind in _NUMERIC:
            flat = np.require(value.reshape(-1), requirements=["C", "W"])  # torch warns of what cannot be written to
            name = self._name(torch.from_numpy(flat.view(np.uint8)), keys)
            return {"array": name, "dtype": value.dtype.str, "shape": list(value.shape)}
        if kind is complex:
            return {"complex": [self.structure(part, keys) for part in (value.real, value.imag)]}
        if kind is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        raise TypeError(f"{_place(keys)} is a {kind.__module__}.{kind.__qualname__}, expected one of {KINDS}")

    def _items(self, value: Mapping[Any, Any], keys: tuple[Any, ...]) -> list[Any]:
        import numpy as np

        for key in value:
            if type(key) not in _KEYS and not isinstance(key, np.generic):
                raise TypeError(f"{_place(keys)} has the key {key!r}, expected strings, numbers or tuples as keys")
        return [[self.structure(key, (*keys, key)), self.structure(item, (*keys, key))] for key, item in value.items()]

    def _versions(self, value: Any, keys: tuple[Any, ...]) -> dict[str, Any]:
        # The versions of its modules that a module's state dict carries: without them an old format is assumed.
        versions = getattr(value, "_metadata", None)
        return {} if versions is None else {"versions": self.structure(versions, (*keys, "_metadata"))}

    def _tensor(self, value: Tensor, keys: tuple[Any, ...]) -> Any:
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            what = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
            raise TypeError(
                f"{_place(keys)} is a tensor ({what}, on {value.device}), expected a dense one with values of its own"
            )
        tensor = value.detach()
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        seen = (*view, tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and seen in self._nodes:
            return self._nodes[seen]
        node: dict[str, Any] = {"tensor": ""}
        tensor = tensor.resolve_conj().resolve_neg()
        if tensor.is_complex():
            node["complex"], tensor = True, torch.view_as_real(tensor)
        if not tensor.is_contiguous():
            strides = tensor.stride()
            order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
            permuted = tensor.permute(order)
            if permuted.is_contiguous():  # channels last, transposed: the memory in its own order
                node["order"], tensor = order, permuted
        tensor = tensor.contiguous()
        if tensor.dtype not in _FILED_AS_THEY_ARE:
            node["dtype"], node["shape"] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
            tensor = tensor.reshape(-1).view(torch.uint8)
        node["tensor"] = self._name(tensor, keys)
        self._nodes[seen] = node
        return node

    def _name(self, tensor: Tensor, keys: tuple[Any, ...]) -> str:
        """File a contiguous tensor, under a name that nobody else has."""
        path = "/".join(map(str, keys)).encode("utf-8", "replace").decode() or "state"
        name, number = path, 1
        while name in self.tensors or name == "__metadata__":  # which the file format keeps for itself
            name, number = f"{path}#{number}", number + 1
        self.tensors[name] = self._of_its_own(tensor.cpu())
        return name

    def _of_its_own(self, tensor: Tensor) -> Tensor:
        """A tensor whose memory no other one shows a part of: the file's writer refuses the others."""
        if not tensor.numel():
            return torch.empty_like(tensor)
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        taken = self._taken.setdefault(tensor.untyped_storage().data_ptr(), [])
        if any(start < end and begin < stop for begin, end in taken):
            return tensor.clone()
        taken.append((start, stop))
        return tensor


class _Whole:
    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self._find = tensor
        self._tensors: dict[str, Tensor] = {}

    def value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        kind: str
        content: Any
        kind, content = next(iter(node.items()), ("", None))
        if kind == "tensor":
            return self._tensor(node)
        if kind in _LISTS:
            return _LISTS[kind](self.value(content))
        if kind in _MAPPINGS:
            made = _MAPPINGS[kind]({self.value(key): self.value(item) for key, item in content})
            if "versions" in node:
                made._metadata = self.value(node["versions"])
            return made
        if kind == "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        if kind == "complex":
            return complex(*map(self.value, content))
        if kind == "number":
            import numpy as np

            return np.frombuffer(bytes.fromhex(content[1]), _numeric(content[0]))[0]
        if kind == "array":
            return self._find(content).numpy().view(_numeric(node["dtype"])).reshape(node["shape"])
        if kind == "bytes":
            return base64.b64decode(content)
        if kind == "dtype":
            return _dtype(content)
        if kind == "device":
            return torch.device(content)
        raise ValueError(f"{kind!r} is not known")

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        name = node["tensor"]
        if name not in self._tensors:
            tensor = self._find(name)
            if "dtype" in node:
                tensor = tensor.view(_dtype(node["dtype"])).reshape(node["shape"])
            if "order" in node:
                order: list[int] = node["order"]
                tensor = tensor.permute([order.index(dim) for dim in range(tensor.dim())])
            self._tensors[name] = torch.view_as_complex(tensor) if node.get("complex") else tensor
        return self._tensors[name]


def _place(keys: tuple[Any, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in keys)


def _numeric(text: str) -> np.dtype[Any]:
    import numpy as np

    dtype: np.dtype[Any] = np.dtype(text)
    if dtype.kind not in _NUMERIC:
        raise ValueError(f"{text!r} is no dtype of numbers")
    return dtype


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype
