"""G_i of parameters that are added to, or multiplied with, something of every sample, by broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._tree import wide_dtype
from ..layout import Layout
from .base import Materialised, NoRule


class BroadcastTerm(Materialised):
    """G_i sums a sample's part of a tensor over the axes along which the parameter was broadcast.

    As small as the parameters of norms and biases are, G is formed at once.

    Args:
        values: what the gradient is before that sum, shaped like the result of the broadcast.
        layout: of values.
        samples: N.
        shape: the parameter's.
    """

    def __init__(self, values: Tensor, layout: Layout, samples: int, shape: torch.Size) -> None:
        if type(layout) is Layout and layout.axis == 0 and values.shape == (samples, *shape):  # a bias: nothing to sum
            super().__init__(values)
            return
        per_sample = layout.per_sample(values, samples)  # [N, k, other axes]
        missing = values.dim() - len(shape)
        axes, kept = [1], []
        for axis in range(values.dim()):
            if axis == layout.axis:
                continue
            at = 2 + axis - (axis > layout.axis)
            if axis < missing or shape[axis - missing] == 1:
                axes.append(at)
            else:
                kept.append(at)
        if layout.axis >= missing and shape[layout.axis - missing] != 1:
            raise NoRule  # a parameter with an axis of samples
        wide = wide_dtype(values.dtype)
        if len(axes) == 1 and per_sample.shape[1] == 1:
            summed = per_sample.squeeze(1)
        else:
            summed = per_sample.sum(axes, dtype=wide)
        super().__init__(summed.reshape(samples, *shape))
