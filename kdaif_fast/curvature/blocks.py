"""The blocks that a Kronecker-factored curvature is made of, each over a layer's or a parameter's elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layers import Layer, Shape

# Eigenvectors of matrices up to this size are computed in float64, which costs little then.
SMALL = 256


class Workspace:
    """Two buffers that every block uses in turn."""

    def __init__(self, elements: int, like: Tensor) -> None:
        self._one, self._two = like.new_empty(elements), like.new_empty(elements)

    def take(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Both of them, in this shape."""
        size = torch.Size(shape).numel()
        return self._one[:size].view(shape), self._two[:size].view(shape)


class KroneckerBlock:
    """(B x A) in the bases of A and B, with eigenvalues of its own: (Q_B x Q_A) diag(values) (Q_B x Q_A)^T.

    Attributes:
        shape: the layer's.
        input_moment: sums of (a, 1) (a, 1)^T over positions: [groups, width, width]. Freed once the bases are known.
        grad_moment: sums of b b^T: [groups, rows, rows].
        positions: how many there were, a tensor.
        input_basis, grad_basis: Q_A and Q_B; eigenvectors are columns.
        input_values, grad_values: the factors' eigenvalues, [groups, width] and [groups, rows].
        values: those of the block, [groups, rows, width].
    """

    def __init__(self, shape: Shape, like: Tensor) -> None:
        g = shape.groups
        self.shape, self.positions = shape, like.new_zeros((), dtype=torch.float64)
        self.input_moment = like.new_zeros(g, shape.width, shape.width)
        self.grad_moment = like.new_zeros(g, shape.rows, shape.rows)
        self.input_basis = self.grad_basis = self.input_values = self.grad_values = self.values = like.new_empty(0)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters."""
        return (self.shape.weight,) if self.shape.bias is None else (self.shape.weight, self.shape.bias)

    @property
    def size(self) -> int:
        """Its number of parameters."""
        return self.shape.groups * self.shape.rows * self.shape.width

    def add(self, layer: Layer, first: bool) -> None:
        """Add a batch's part; `first`: whether its inputs have not been added yet."""
        positions = layer.grad_moment(self.grad_moment)
        if first:
            layer.input_moment(self.input_moment)
            self.positions += positions

    def sums(self) -> list[Tensor]:
        """What is added up over ranks."""
        return [self.input_moment, self.grad_moment, self.positions]

    def decompose(self, samples: int) -> None:
        """Find the bases, and the eigenvalues of the Kronecker product.

        Over T positions a sample's gradient is a sum; taking positions to be uncorrelated and alike, the mean of its
        square is T E[a a^T] x E[b b^T], means over all positions (Grosse and Martens 2016, section 3).
        """
        per_sample = self.input_moment / samples
        per_position = self.grad_moment / self.positions.clamp(min=1).to(self.grad_moment.dtype)
        self.input_values, self.input_basis = _eigh(per_sample)
        self.grad_values, self.grad_basis = _eigh(per_position)
        self.values = self.grad_values.unsqueeze(2) * self.input_values.unsqueeze(1)
        self.input_moment = self.grad_moment = self.values.new_empty(0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B: [groups, width, width] and [groups, rows, rows]."""
        return (
            (self.input_basis * self.input_values.unsqueeze(1)) @ self.input_basis.mT,
            (self.grad_basis * self.grad_values.unsqueeze(1)) @ self.grad_basis.mT,
        )

    def inverse_values(self, damping: float, factored: bool) -> Tensor:
        """What the solve multiplies with in the eigenbasis: [groups, rows, width]."""
        if not factored:
            return (self.values + damping).reciprocal_()
        # Both factors are damped so that their eigenvalues change in proportion (Martens and Grosse 2015, section 6.3).
        mean_in, mean_out = (x.mean(1, keepdim=True) for x in (self.input_values, self.grad_values))
        tiny = torch.finfo(mean_in.dtype).tiny
        pi = (mean_in.clamp(min=tiny) / mean_out.clamp(min=tiny)).sqrt()
        root = damping**0.5
        return (
            (self.grad_values + root / pi).unsqueeze(2) * (self.input_values + root * pi).unsqueeze(1)
        ).reciprocal_()

    def apply(
        self, rows: Mapping[str, Tensor], out: Mapping[str, Tensor], factors: Tensor, workspace: Workspace
    ) -> None:
        """(Q_B x Q_A) diag(factors) (Q_B x Q_A)^T times rows: {name: [K, numel]} -> out, of the same form."""
        shape, A, B = self.shape, self.input_basis, self.grad_basis
        K, columns = len(rows[shape.weight]), shape.columns
        one, two = workspace.take(K, shape.groups, shape.rows, shape.width)
        _times(self._matrices(rows[shape.weight]), A[:, :columns], one)
        if shape.bias is not None:
            bias = rows[shape.bias].view(K, shape.groups, shape.rows, 1)
            one.addcmul_(bias, A[:, columns].unsqueeze(1))
        _times_left(B.mT, one, two)
        two *= factors
        _times_left(B, two, one)
        _times(one, A[:, :columns].mT, self._matrices(out[shape.weight]))
        if shape.bias is not None:
            last = two.copy_(one).mul_(A[:, columns].unsqueeze(1))
            torch.sum(last, 3, out=out[shape.bias].view(K, shape.groups, shape.rows))

    def _matrices(self, rows: Tensor) -> Tensor:
        """[K, numel] of the weight as [K, groups, rows, columns], a view."""
        shape = self.shape
        if shape.flipped:
            return rows.view(-1, 1, shape.columns, shape.rows).mT
        return rows.view(-1, shape.groups, shape.rows, shape.columns)

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal: {name: [numel]}."""
        full = self.grad_basis.square() @ self.values @ self.input_basis.square().mT
        found = {}
        weight = torch.empty_like(full[..., : self.shape.columns]).flatten()
        self._matrices(weight.unsqueeze(0)).copy_(full[..., : self.shape.columns])
        found[self.shape.weight] = weight
        if self.shape.bias is not None:
            found[self.shape.bias] = full[..., -1].flatten()
        return found

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        names = ("input_basis", "grad_basis", "input_values", "grad_values", "values")
        return {"shape": tuple(self.shape), **{name: getattr(self, name) for name in names}}

    @staticmethod
    def load(state: Mapping[str, Any], like: Tensor) -> KroneckerBlock:
        """The block of which `state` was made."""
        block = KroneckerBlock(Shape(*state["shape"]), like)
        for name, value in state.items():
            if name != "shape":
                setattr(block, name, value.to(like))
        block.input_moment = block.grad_moment = like.new_empty(0)
        return block


class DiagonalBlock:
    """The mean squared gradient of every element of a parameter that no Kronecker block covers.

    Attributes:
        name: of the parameter.
        values: [numel].
    """

    def __init__(self, name: str, size: int, like: Tensor) -> None:
        self.name, self.values = name, like.new_zeros(size)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameter."""
        return (self.name,)

    @property
    def size(self) -> int:
        """Its number of elements."""
        return self.values.numel()

    def sums(self) -> list[Tensor]:
        """See KroneckerBlock."""
        return [self.values]

    def inverse_values(self, damping: float, factored: bool) -> Tensor:
        """What the solve multiplies with."""
        return (self.values + damping).reciprocal_()

    def apply(
        self, rows: Mapping[str, Tensor], out: Mapping[str, Tensor], factors: Tensor, workspace: Workspace
    ) -> None:
        """diag(factors) times rows."""
        torch.mul(rows[self.name], factors, out=out[self.name])

    def diagonal(self) -> dict[str, Tensor]:
        """See KroneckerBlock."""
        return {self.name: self.values}

    def state(self) -> dict[str, Any]:
        """See KroneckerBlock."""
        return {"name": self.name, "values": self.values}

    @staticmethod
    def load(state: Mapping[str, Any], like: Tensor) -> DiagonalBlock:
        """See KroneckerBlock."""
        block = DiagonalBlock(state["name"], 0, like)
        block.values = state["values"].to(like)
        return block


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not below 0, and eigenvectors as columns."""
    wide = matrices.double() if matrices.shape[-1] <= SMALL and not matrices.is_cuda else matrices
    values, vectors = torch.linalg.eigh(wide)
    return values.clamp_(min=0).to(matrices.dtype), vectors.to(matrices.dtype)


def _times(x: Tensor, matrices: Tensor, out: Tensor) -> None:
    """[K, g, m, n] @ [g, n, p] into out, without a copy of either."""
    if x.shape[1] == 1:
        torch.bmm(x[:, 0], matrices.expand(len(x), -1, -1), out=out[:, 0])
        return
    for rows, result in zip(x, out, strict=True):
        torch.bmm(rows, matrices, out=result)


def _times_left(matrices: Tensor, x: Tensor, out: Tensor) -> None:
    """[g, l, m] @ [K, g, m, n] into out."""
    if x.shape[1] == 1:
        torch.bmm(matrices.expand(len(x), -1, -1), x[:, 0], out=out[:, 0])
        return
    for rows, result in zip(x, out, strict=True):
        torch.bmm(matrices, rows, out=result)
