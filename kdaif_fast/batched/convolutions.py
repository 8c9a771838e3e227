"""Convolutions with K cotangents, and the derivative of their backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_backward = torch.ops.aten.convolution_backward.default


def _settings(node: Any) -> tuple[Any, ...]:
    return (
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
    )


def convolution(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Tensor | None]:
    """K belongs to the samples for the inputs' gradient; the weights' are K products with the same inputs."""
    (given,) = cotangents
    assert given is not None
    K, settings = len(given), _settings(node)
    inputs, weight = node._saved_input, node._saved_weight
    gradients: list[Tensor | None] = [None, None, None]
    if wanted[0] is not None:
        shape = given.new_empty(K * wanted[0][0], *wanted[0][1:])  # only its shape is read
        folded = given.reshape(K * given.shape[1], *given.shape[2:])
        gradient = _backward(folded, shape, weight, None, *settings, [True, False, False])[0]
        gradients[0] = gradient.view(K, *wanted[0])
    if wanted[1] is not None:
        shape = given.new_empty(wanted[1])
        gradients[1] = _stacked([_backward(g, inputs, shape, None, *settings, [False, True, False])[1] for g in given])
    if wanted[2] is not None:
        gradients[2] = given.sum([dim for dim in range(1, given.dim()) if dim != 2])
    return gradients


def convolution_twice(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Tensor | None]:
    """The backward pass is bilinear in (gradient at the outputs, weight) and in (that gradient, inputs).

    So its derivatives are convolutions, and backward passes, with the cotangents in place of inputs and weight. PyTorch
    goes by convolutions with samples and channels exchanged instead, whose kernels are as large as the images.
    """
    to_inputs, to_weight, to_bias = cotangents
    first = next(c for c in cotangents if c is not None)
    K, settings = len(first), _settings(node)
    at_outputs, inputs, weight = node._saved_grad_output, node._saved_input, node._saved_weight
    gradients: list[Tensor | None] = [None, None, None]
    if wanted[0] is not None:
        total = None
        if to_inputs is not None:
            folded = to_inputs.reshape(K * to_inputs.shape[1], *to_inputs.shape[2:])
            total = torch.convolution(folded, weight, None, *settings).view(K, *wanted[0])
        if to_weight is not None:
            bias = [None] * K if to_bias is None else to_bias
            if total is None:
                total = _stacked(
                    [torch.convolution(inputs, w, b, *settings) for w, b in zip(to_weight, bias, strict=True)]
                )
            else:
                for rows, w, b in zip(total, to_weight, bias, strict=True):
                    rows += torch.convolution(inputs, w, b, *settings)
        elif to_bias is not None:
            added = to_bias.reshape(K, 1, -1, *[1] * (len(wanted[0]) - 2))
            total = added.expand(K, *wanted[0]) if total is None else total.add_(added)
        gradients[0] = total
    if wanted[1] is not None and to_weight is not None:
        shape = at_outputs.new_empty(wanted[1])
        gradients[1] = _stacked(
            [_backward(at_outputs, shape, w, None, *settings, [True, False, False])[0] for w in to_weight]
        )
    if wanted[2] is not None and to_inputs is not None:
        shape = at_outputs.new_empty(wanted[2])
        gradients[2] = _stacked(
            [_backward(at_outputs, x, shape, None, *settings, [False, True, False])[1] for x in to_inputs]
        )
    return gradients


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
