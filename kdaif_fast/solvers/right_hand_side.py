"""Right-hand sides as dictionaries of parameters' gradients, and solutions in the same form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._tree import wide_dtype


def as_rows(b: Any, operator: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """b as a tensor [P] or [K, P], and what brings a tensor like it into the form of b.

    Raises TypeError or ValueError if b does not fit the operator's parameters; it names the entry.
    """
    if isinstance(b, Tensor):
        return b, lambda x: x
    if not isinstance(b, Mapping):
        raise TypeError(f"solve: b is a {type(b).__name__}, expected a tensor or a dictionary of tensors")
    parameters = getattr(operator, "parameters", None)
    if not isinstance(parameters, Mapping):
        raise TypeError("solve: b is a dictionary, expected a tensor [P] or [K, P] for an operator without .parameters")
    if set(b) != set(parameters):
        missing, unknown = sorted(set(parameters) - set(b)), sorted(map(str, set(b) - set(parameters)))
        wrong = [f"{name!r} is missing" for name in missing] + [f"{name!r} is unknown" for name in unknown]
        raise ValueError(f"solve: b and the operator's parameters differ in their names: {', '.join(wrong[:5])}")
    K = _stacked_count(b, parameters)
    rows = [b[name].detach().reshape(K or 1, -1).to(wide_dtype(b[name].dtype)) for name in parameters]
    flat = torch.cat(rows, 1)

    def as_given(x: Tensor) -> dict[str, Tensor]:
        pieces = x.split([parameter.numel() for parameter in parameters.values()], -1)
        return {name: piece.reshape(b[name].shape) for name, piece in zip(parameters, pieces, strict=True)}

    return (flat if K is not None else flat[0]), as_given


def _stacked_count(b: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> int | None:
    """K if every entry has a leading K, None if none has one."""
    for name in parameters:
        if not isinstance(b[name], Tensor):
            raise TypeError(f"solve: b[{name!r}] is a {type(b[name]).__name__}, expected a tensor")
    first = next(iter(parameters))
    is_stacked = b[first].dim() == parameters[first].dim() + 1
    K = len(b[first]) if is_stacked else None
    for name, parameter in parameters.items():
        expected = tuple(parameter.shape) if K is None else (K, *parameter.shape)
        if tuple(b[name].shape) != expected:
            other = f" or (K, {', '.join(map(str, parameter.shape))})" if name == first else f" as b[{first!r}]"
            raise ValueError(f"solve: b[{name!r}] has shape {tuple(b[name].shape)}, expected {expected}{other}")
        if not b[name].is_floating_point():
            raise TypeError(f"solve: b[{name!r}] has dtype {b[name].dtype}, expected a floating-point dtype")
        if b[name].device != parameter.device:
            raise ValueError(f"solve: b[{name!r}] is on {b[name].device}, expected {parameter.device} as the parameter")
        if not bool(b[name].isfinite().all()):
            raise ValueError(f"solve: b[{name!r}] has values that are not finite")
    return K
