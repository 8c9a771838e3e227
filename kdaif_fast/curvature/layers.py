"""One batch's part of a layer that is linear in its parameters: its inputs a and the gradients b at its outputs.

Every sample's gradient is G_i = sum_t b_it (a_it, 1)^T over the positions t: those of a sequence, the patches of a
convolution, the calls of a layer that is used several times. A bias is the column of an input that is always 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..per_sample.groups import Group
from ..per_sample.paths import Path
from ..per_sample.terms import ConvolutionTerm, LinearTerm, Materialised, Term

# What is made only to be squared or summed is made in blocks of about this many elements: 4 MB, which caches hold.
BLOCK_ELEMENTS = 1 << 20


class Shape(NamedTuple):
    """What a layer's gradient looks like: G matrices [rows, columns + 1] with a bias, else [rows, columns].

    Args:
        weight: name of the parameter.
        bias: name of the bias, or None.
        groups: how many independent parts the layer has (those of a grouped convolution).
        rows: outputs of each part.
        columns: inputs of each part.
        flipped: whether the parameter is [columns, rows].
    """

    weight: str
    bias: str | None
    groups: int
    rows: int
    columns: int
    flipped: bool

    @property
    def width(self) -> int:
        """The columns, with that of the bias."""
        return self.columns + (self.bias is not None)


def find_layer(group: Group) -> Layer | None:
    """The layer that a group of parameters makes: one weight, and maybe one bias that is always used with it.

    None for anything else: a norm, an embedding, a weight that is used in two ways, or made of other parameters.
    """
    weights: list[tuple[Path, Term]] = []
    biases: list[tuple[Path, Term]] = []
    for meeting in group.meetings:
        found = [member for member in meeting if isinstance(member[1], (LinearTerm, ConvolutionTerm))]
        rest = [member for member in meeting if not isinstance(member[1], (LinearTerm, ConvolutionTerm))]
        if len(found) != 1 or len(rest) > 1:
            return None
        weights += found
        biases += rest
    if len(biases) not in (0, len(weights)):
        return None
    path, term = weights[0]
    if path.leaf is None or any(other.kind != path.kind for other, _ in weights):
        return None
    bias = None
    if biases:
        bias_path = biases[0][0]
        if bias_path.leaf is None or any(other.kind != bias_path.kind for other, _ in biases):
            return None
        if not all(isinstance(t, Materialised) and len(t.shape) == 1 for _, t in biases):
            return None
        (bias,) = bias_path.parameters
    (name,) = path.parameters
    if isinstance(term, ConvolutionTerm):
        if len(weights) > 1 or term.convolution.transposed:
            return None
        groups = term.convolution.groups
        shape = Shape(name, bias, groups, term.shape[0] // groups, term.shape[1:].numel(), False)
        return ConvolutionLayer(shape, term)
    linear = [each for _, each in weights if isinstance(each, LinearTerm)]
    if len(linear) < len(weights) or len({(t.transposed, t.shape, t.inputs.dtype) for t in linear}) > 1:
        return None
    joined = linear[0] if len(linear) == 1 else LinearTerm.joined(linear)
    rows, columns = joined.output_grads.shape[2], joined.inputs.shape[2]
    return LinearLayer(Shape(name, bias, 1, rows, columns, joined.transposed != path.transposes), joined)


class Layer(ABC):
    """What of a layer is asked for; inputs and output gradients are [N, T, ...]."""

    shape: Shape

    @abstractmethod
    def input_moment(self, out: Tensor) -> None:
        """Add sum_it (a_it, 1) (a_it, 1)^T to [groups, width, width]."""

    @abstractmethod
    def grad_moment(self, out: Tensor) -> int:
        """Add sum_it b_it b_it^T to [groups, rows, rows]; returns the number of positions, N T."""

    @abstractmethod
    def squares(self, grad_basis: Tensor, input_basis: Tensor, out: Tensor) -> None:
        """Add sum_i (B^T G_i A)^2, element by element, to [groups, rows, width]; the bases' columns are B and A."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""


class LinearLayer(Layer):
    """Of z = W a: any number of positions."""

    def __init__(self, shape: Shape, term: LinearTerm) -> None:
        self.shape, self._term = shape, term

    def input_moment(self, out: Tensor) -> None:
        """See Layer."""
        a = self._term.inputs.reshape(-1, self.shape.columns).to(out.dtype)
        _add_moment(a, out[0], self.shape)

    def grad_moment(self, out: Tensor) -> int:
        """See Layer."""
        b = self._term.output_grads.reshape(-1, self.shape.rows).to(out.dtype)
        out[0].addmm_(b.T, b)
        return len(b)

    def squares(self, grad_basis: Tensor, input_basis: Tensor, out: Tensor) -> None:
        """See Layer."""
        B, A = grad_basis[0], input_basis[0]
        N, T = self._term.inputs.shape[:2]
        rows, columns, width = self.shape.rows, self.shape.columns, self.shape.width
        if T == 1:
            b = self._term.output_grads.reshape(N, rows).to(out.dtype) @ B
            a = _turned(self._term.inputs.reshape(N, columns).to(out.dtype), A, columns)
            out[0].addmm_(b.square_().T, a.square_())
            return
        # The bases are applied to whichever is smaller: a sample's positions or its gradient.
        early = rows >= T
        for start, stop in _blocks(N, max(rows * width, T * (rows + width))):
            a, b = (x[start:stop].to(out.dtype) for x in (self._term.inputs, self._term.output_grads))
            b = (b.reshape(-1, rows) @ B).view(stop - start, T, rows)
            if early:
                a = _turned(a.reshape(-1, columns), A, columns).view(stop - start, T, width)
                G = LinearTerm(a, b).grads()
            else:
                G = _turned(LinearTerm(a, b).grads(), A, columns, b.sum(1) if width > columns else None)
            out[0] += G.square_().sum(0)

    def tensors(self) -> tuple[Tensor, ...]:
        """See Layer."""
        return self._term.inputs, self._term.output_grads


class ConvolutionLayer(Layer):
    """Of a convolution in 1 to 3 dimensions: patches are made for one block of samples at a time."""

    def __init__(self, shape: Shape, term: ConvolutionTerm) -> None:
        self.shape, self._term = shape, term

    def _grads(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The b of some images: [n, groups, rows, T]."""
        b = self._term.output_grads[start:stop].to(dtype)
        return b.reshape(len(b), self.shape.groups, self.shape.rows, -1)

    def _images(self) -> Iterator[tuple[int, int]]:
        positions = self._term.output_grads[0, 0].numel()
        return _blocks(len(self._term.inputs), positions * self.shape.columns * self.shape.groups)

    def input_moment(self, out: Tensor) -> None:
        """See Layer."""
        for start, stop in self._images():
            patches = self._term.patches(start, stop).to(out.dtype)  # [groups, n T, columns]
            if self.shape.groups == 1:
                _add_moment(patches[0], out[0], self.shape)
            else:
                for patch, part in zip(patches, out, strict=True):
                    _add_moment(patch, part, self.shape)

    def grad_moment(self, out: Tensor) -> int:
        """See Layer."""
        R = len(self._term.inputs)
        for start, stop in _blocks(R, self._term.output_grads[0].numel()):
            b = self._grads(start, stop, out.dtype).permute(1, 2, 0, 3).flatten(2)
            out.baddbmm_(b, b.mT)
        return R * self._term.output_grads[0, 0].numel()

    def squares(self, grad_basis: Tensor, input_basis: Tensor, out: Tensor) -> None:
        """See Layer."""
        groups, rows, columns, width = self.shape.groups, self.shape.rows, self.shape.columns, self.shape.width
        positions = self._term.output_grads[0, 0].numel()
        if groups == 1 and self._term.one_image and positions < rows:
            for start, stop in self._images():
                patches = self._term.patches(start, stop)[0].view(stop - start, positions, columns)
                b = self._term.output_grads[start:stop].flatten(2).mT
                LinearLayer(self.shape, LinearTerm(patches, b)).squares(grad_basis, input_basis, out)
            return
        for start, stop in _blocks(self._term.samples, groups * rows * width):
            part = self._term.block(start, stop)
            x, b = part.inputs.to(out.dtype), part.output_grads.to(out.dtype)
            flat = b.reshape(len(b), groups, rows, -1)
            turned = torch.matmul(grad_basis.mT, flat)
            b = turned.view_as(b)
            part = ConvolutionTerm(x, b, part.convolution, part.layout, part.samples, part.shape)
            G = part.grads().reshape(stop - start, groups, rows, columns)
            sums = part.layout.sum_rows(turned.sum(3), part.samples) if width > columns else None
            if groups == 1:
                G = _turned(G[:, 0], input_basis[0], columns, None if sums is None else sums[:, 0]).unsqueeze(1)
            else:
                G = torch.matmul(G, input_basis[:, :columns])
                if sums is not None:
                    G += sums.unsqueeze(3) * input_basis[:, columns].unsqueeze(1)
            out += G.square_().sum(0)

    def tensors(self) -> tuple[Tensor, ...]:
        """See Layer."""
        return self._term.inputs, self._term.output_grads


def _add_moment(a: Tensor, out: Tensor, shape: Shape) -> None:
    """Add sum_m (a_m, 1) (a_m, 1)^T over the rows of [M, columns]."""
    columns = shape.columns
    if shape.bias is None:
        out.addmm_(a.T, a)
        return
    out[:columns, :columns].addmm_(a.T, a)
    sums = a.sum(0)
    out[:columns, columns] += sums
    out[columns, :columns] += sums
    out[columns, columns] += len(a)


def _turned(x: Tensor, basis: Tensor, columns: int, last: Tensor | None = None) -> Tensor:
    """(x, last) @ basis for [..., columns] and [...]; without `last` it is 1, if the basis has a row for it."""
    if len(basis) == columns:
        return x @ basis
    if last is None:
        return torch.addmm(basis[columns], x, basis[:columns])
    turned = x @ basis[:columns]
    return turned.addcmul_(last.unsqueeze(-1), basis[columns])


def _blocks(samples: int, each: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples with about BLOCK_ELEMENTS in all."""
    step = max(1, BLOCK_ELEMENTS // max(1, each))
    return ((start, min(start + step, samples)) for start in range(0, samples, step))
