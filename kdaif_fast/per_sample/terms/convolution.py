"""G_i of a convolution's weight: the correlation of a sample's input with its output gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops.persample_conv import persample_conv
from ..layout import Layout, Scattered
from .base import Materialised, Term

# Kept for the weighted sum, per-sample gradients may take this many elements for each element of what made them. On a
# CPU: on a GPU the vendor's convolutions are fast, and per-sample gradients cost more than they save.
KEEP_RATIO = 4

# What is passed is right by construction, and nobody differentiates it: straight to the kernels, past all checks.
_KERNELS = torch.ops.kdaif_fast


@dataclass(frozen=True)
class Convolution:
    """A convolution's numbers, as ATen has them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]


class ConvolutionTerm(Term):
    """Of z = conv(x; W) over R = N * k images, k of them a sample (mostly 1).

    Args:
        inputs: x [R, C, *S].
        output_grads: b [R, O, *positions].
        convolution: its numbers.
        layout: how the samples' images are ordered.
        samples: N.
        shape: the weight's.
    """

    def __init__(
        self,
        inputs: Tensor,
        output_grads: Tensor,
        convolution: Convolution,
        layout: Layout,
        samples: int,
        shape: torch.Size,
    ) -> None:
        if inputs.dtype != output_grads.dtype:
            inputs = inputs.to(output_grads.dtype)
        self.inputs, self.output_grads, self.convolution = inputs, output_grads, convolution
        self.layout, self.samples, self.shape = layout, samples, shape
        self.dtype = output_grads.dtype

    def _call(
        self, directions: Tensor | None = None, *, grads: bool = False, norms: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        c = self.convolution
        return persample_conv(
            *self._pair,
            None if directions is None else directions.to(self.inputs.dtype),
            kernel=self.shape[2:],
            stride=c.stride,
            padding=c.padding,
            dilation=c.dilation,
            groups=c.groups,
            grads=grads,
            norms=norms,
            out=out,
        )

    @property
    def _pair(self) -> tuple[Tensor, Tensor]:
        """As persample_conv takes them."""
        return (self.output_grads, self.inputs) if self.convolution.transposed else (self.inputs, self.output_grads)

    @property
    def by_convolution(self) -> bool:
        """Whether dots are had from a convolution, at a convolution's cost."""
        return self.inputs.is_cuda

    @property
    def one_image(self) -> bool:
        """Whether image i is sample i."""
        return len(self.inputs) == self.samples and not isinstance(self.layout, Scattered)

    @property
    def is_plain(self) -> bool:
        """Whether G_i[o] = sum_t b_it[o] patch_it: one image a sample, one group, not transposed."""
        return self.one_image and self.convolution.groups == 1 and not self.convolution.transposed

    def grads(self, out: Tensor | None = None) -> Tensor:
        """See Term."""
        if self.one_image and out is not None:
            self._call(out=out)
            return out
        G = self._call(grads=True)[0]
        assert G is not None
        G = self.layout.sum_rows(G, self.samples)
        return G if out is None else out.copy_(G)

    def dots(self, directions: Tensor) -> Tensor:
        """See Term."""
        if self.by_convolution:
            c = self.convolution
            dots = _KERNELS.persample_conv.default(
                *self._pair, directions, self.shape[2:], c.stride, c.padding, c.dilation, c.groups, False, False
            )[1]
        else:
            dots = self._call(directions)[1]
        assert dots is not None
        return self.layout.sum_rows(dots, self.samples)

    def squared_norms(self) -> Tensor:
        """See Term."""
        if not self.one_image:
            return super().squared_norms()
        norms = self._call(norms=True)[2]
        assert norms is not None
        return norms

    def weighted(self, weights: Tensor) -> Tensor:
        """See Term."""
        c, x, b = self.convolution, self.inputs, self.output_grads
        if x.numel() < b.numel():  # images of few channels, mostly
            x = self.layout.scale(x, weights)
        else:
            b = self.layout.scale(b, weights)
        _, grad, _ = torch.ops.aten.convolution_backward(
            b,
            x,
            self.inputs.new_empty(1).expand(self.shape),  # of the weight, only the shape is used
            None,
            c.stride,
            c.padding,
            c.dilation,
            c.transposed,
            c.output_padding,
            c.groups,
            [False, True, False],
        )
        return grad

    def step(self, directions: Tensor) -> tuple[Tensor, Term]:
        """See Term."""
        held = self.inputs[0].numel() + self.output_grads[0].numel()
        if self.by_convolution or not self.one_image or math.prod(self.shape) > KEEP_RATIO * held:
            return self.dots(directions), self
        G, dots, _ = self._call(directions, grads=True)
        assert G is not None
        assert dots is not None
        return dots, Materialised(G)

    def patches(self, start: int, stop: int) -> Tensor:
        """What each output of some images is made of: [groups, (stop - start) * positions, C / groups * kernel]."""
        c, x = self.convolution, self.inputs[start:stop]
        if any(c.padding):
            x = nn.functional.pad(x, [p for size in reversed(c.padding) for p in (size, size)])
        last = self.output_grads.dim() - 2
        for axis in range(last):  # [R, C, *positions, *kernel], a view
            kernel, stride, dilation = self.shape[2 + axis], c.stride[axis], c.dilation[axis]
            x = x.unfold(2 + axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
            x = x.narrow(2 + axis, 0, self.output_grads.shape[2 + axis])
        x = x.unflatten(1, (c.groups, -1)).movedim(2, 2 + last)  # [R, groups, *positions, C / groups, *kernel]
        return x.transpose(0, 1).reshape(c.groups, -1, self.shape[1:].numel())

    def block(self, start: int, stop: int) -> ConvolutionTerm:
        """See Term."""
        if self.one_image:
            chosen: slice | Tensor = slice(start, stop)
            layout = self.layout
        else:
            numbers = torch.arange(self.samples, device=self.inputs.device)
            owner = self.layout.per_row(numbers, len(self.inputs))
            chosen = (owner >= start) & (owner < stop)
            layout = Scattered(owner[chosen] - start)
        x, b = self.inputs[chosen], self.output_grads[chosen]
        return ConvolutionTerm(x, b, self.convolution, layout, stop - start, self.shape)
