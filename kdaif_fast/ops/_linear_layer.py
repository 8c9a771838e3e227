"""Argument checks of the ops on a linear layer's inputs and output gradients, [N, T, I] and [N, T, O]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _check


def check_layer(op: str, inputs: Any, output_grads: Any) -> None:
    """Raise unless both are floating-point tensors of three axes that agree in samples, positions, dtype and device."""
    _check_axes(op, "inputs", inputs, "[N, T, I]")
    _check_axes(op, "output_grads", output_grads, "[N, T, O]")
    if inputs.shape[:2] != output_grads.shape[:2]:
        expected = ", ".join(map(str, inputs.shape[:2]))
        raise ValueError(
            f"{op}: output_grads has shape {tuple(output_grads.shape)}, expected [{expected}, O] as inputs of shape "
            f"{tuple(inputs.shape)}"
        )
    _check_dtype(op, "output_grads", output_grads, inputs)
    _check_device(op, "output_grads", output_grads, inputs)


def check_directions(op: str, directions: Any, inputs: Tensor, output_grads: Tensor) -> None:
    """Raise unless they are floating-point weight matrices [K, O, I] on the inputs' device."""
    _check_axes(op, "directions", directions, "[K, O, I]")
    O, I = output_grads.shape[2], inputs.shape[2]  # noqa: E741 (the letters of the definition)
    if directions.shape[1] != O or directions.shape[2] != I:
        raise ValueError(
            f"{op}: directions has shape {tuple(directions.shape)}, expected [K, {O}, {I}]: the features of "
            "output_grads and of inputs"
        )
    _check_device(op, "directions", directions, inputs)


def check_weights(op: str, weights: Any, inputs: Tensor) -> None:
    """Raise unless there is one floating-point weight a sample, on the inputs' device."""
    _check.is_floating(op, "weights", weights, "[...]")
    _check.is_like(op, "weights", weights, inputs.shape[:1], "the number of samples in inputs", inputs.device)


def check_out(op: str, out: Any, inputs: Tensor, output_grads: Tensor) -> None:
    """Raise unless the gradients [N, O, I] can be written to it: shape, dtype and device."""
    _check.is_tensor(op, "out", out)
    shape = (inputs.shape[0], output_grads.shape[2], inputs.shape[2])
    _check.is_like(op, "out", out, shape, "[N, O, I] of inputs and output_grads", inputs.device)
    _check_dtype(op, "out", out, inputs)


def _check_axes(op: str, name: str, value: Any, axes: str) -> None:
    _check.is_floating(op, name, value, "[...]")
    if value.dim() != 3:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected {axes}")


def _check_dtype(op: str, name: str, value: Tensor, inputs: Tensor) -> None:
    if value.dtype != inputs.dtype:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected {inputs.dtype} as inputs")


def _check_device(op: str, name: str, value: Tensor, inputs: Tensor) -> None:
    if value.device != inputs.device:
        raise ValueError(f"{op}: {name} is on device {value.device}, expected {inputs.device} as inputs")
