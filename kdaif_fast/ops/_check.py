"""Argument checks shared by the ops: an error names the argument, its value, and what was expected."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_tensor(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {reprlib.repr(value)} ({type(value).__name__}), expected a torch.Tensor")


def is_logits(op: str, name: str, value: Any) -> None:
    """Raise unless value is a floating-point tensor [..., V] with at least one class."""
    is_tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected one of {expected}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected [..., V] with V >= 1 classes")


def is_floating(op: str, name: str, value: Any, shape: str) -> None:
    """Raise unless value is a floating-point tensor; `shape` says which axes are expected.

    The last must not be empty, except of "[...]".
    """
    is_tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected one of {expected}")
    if shape != "[...]" and (value.dim() == 0 or value.shape[-1] == 0):
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}, expected {shape} with a last axis of at least 1"
        )


def is_integer(op: str, name: str, value: Any, least: int | None = None) -> None:
    """Raise unless value is an integer, and not below `least`."""
    expected = "an integer" if least is None else f"an integer >= {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} is {reprlib.repr(value)} ({type(value).__name__}), expected {expected}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} is {value!r}, expected {expected}")


def is_like(op: str, name: str, value: Any, shape: Sequence[int], other: str, device: torch.device) -> None:
    """Raise unless value is a tensor of that shape on that device; `other` says what the shape comes from."""
    is_tensor(op, name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)} as {other}")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on device {value.device}, expected {device} as {other}")


def is_positive(op: str, name: str, value: Any) -> None:
    """Raise unless value is a positive finite number."""
    _is_number(op, name, value, "a positive finite number")
    if not 0 < value < math.inf:  # also false for NaN, and a compiler can follow it
        raise ValueError(f"{op}: {name} is {value!r}, expected a positive finite number")


def is_finite(op: str, name: str, value: Any) -> None:
    """Raise unless value is a finite number."""
    _is_number(op, name, value, "a finite number")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} is {value!r}, expected a finite number")


def is_share(op: str, name: str, value: Any) -> None:
    """Raise unless value is a number from 0 to 1."""
    _is_number(op, name, value, "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} is {value!r}, expected a number from 0 to 1")


def _is_number(op: str, name: str, value: Any, expected: str) -> None:
    # float and int first: those a compiler can follow when they are symbols.
    if isinstance(value, bool) or (not isinstance(value, (float, int)) and not isinstance(value, Real)):
        raise TypeError(f"{op}: {name} is {reprlib.repr(value)} ({type(value).__name__}), expected {expected}")


def is_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def are_labels(op: str, name: str, value: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Raise ValueError at the first label that is neither in [0, classes) nor ignore_index. Looks at the values."""
    outside = (value < 0) | (value >= classes)
    if ignore_index is not None:
        outside &= value != ignore_index
    outside = outside.flatten().nonzero()
    if len(outside):
        index = int(outside[0])
        label = int(value.flatten()[index])
        raise ValueError(f"{op}: {name}[{index}] is {label}, expected 0 <= label < {classes} (the number of classes)")


def are_probabilities(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError at the first value outside [0, 1] (NaN is not looked for). Looks at the values."""
    bad = ((value < 0) | (value > 1.001)).nonzero()
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(f"{op}: {name}{list(index)} is {value[index].item()}, expected a probability")


def are_positive(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError at the first value that is not a positive finite number. Looks at the values."""
    bad = (~((value > 0) & value.isfinite())).flatten().nonzero()
    if len(bad):
        index = int(bad[0])
        raise ValueError(f"{op}: {name}[{index}] is {value.flatten()[index].item()}, expected a positive finite number")


def is_finite_logits(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError at the first NaN or +infinity; -infinity is a masked class and legal. Looks at the values."""
    bad = (value.isnan() | (value == math.inf)).nonzero()
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(f"{op}: {name}{list(index)} is {value[index].item()}, expected a number or -inf")
