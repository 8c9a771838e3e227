"""Where the samples of a batch are in a tensor: along which axis, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples along one axis of N * k rows: k successive rows a sample, or (interleaved) every N-th row.

    [N, T, d] has axis 0 and k = 1; flattened to [N * T, d], k = T; [T, N, d] has axis 1, flattened it is interleaved.
    """

    axis: int
    interleaved: bool = False

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether a tensor of this shape can have N samples so."""
        return len(shape) > self.axis and shape[self.axis] % samples == 0

    def per_sample(self, x: Tensor, samples: int) -> Tensor:
        """[N, k, other axes in their order], a view where x allows it."""
        x = x.movedim(self.axis, 0)
        if self.interleaved:
            return x.unflatten(0, (-1, samples) if x.shape[0] else (0, samples)).transpose(0, 1)
        return x.unflatten(0, (samples, x.shape[0] // samples))

    def per_row(self, values: Tensor, rows: int) -> Tensor:
        """[N, ...], one value a sample -> [rows, ...], one a row of the axis."""
        times = rows // values.shape[0]
        if times == 1:
            return values
        return (
            values.repeat(times, *[1] * (values.dim() - 1)) if self.interleaved else values.repeat_interleave(times, 0)
        )

    def scale(self, x: Tensor, weights: Tensor) -> Tensor:
        """x with every sample's part times its weight."""
        by_row = self.per_row(weights, x.shape[self.axis]).to(x.dtype)
        return x * by_row.reshape(-1, *[1] * (x.dim() - self.axis - 1))

    def sum_rows(self, values: Tensor, samples: int) -> Tensor:
        """[rows, ...] of this axis -> [N, ...], summed over each sample's rows."""
        if values.shape[0] == samples:
            return values
        return Layout(0, self.interleaved).per_sample(values, samples).sum(1)


class Scattered(Layout):
    """Rows of axis 0 in any order and number: which sample each belongs to is in a vector.

    Tokens that a router has gathered by expert, or a packed sequence, are laid out so.
    """

    def __init__(self, owner: Tensor) -> None:
        super().__init__(0)
        object.__setattr__(self, "owner", owner)

    owner: Tensor

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether there is an owner for every row."""
        return len(shape) > 0 and shape[0] == len(self.owner)

    def per_sample(self, x: Tensor, samples: int) -> Tensor:
        """[N, k, ...] with k the most rows that a sample has; samples with fewer are filled up with zeros."""
        order = self.owner.argsort(stable=True)
        counts = torch.bincount(self.owner, minlength=samples)
        first = counts.cumsum(0) - counts
        position = torch.arange(len(order), device=x.device) - first[self.owner[order]]
        padded = x.new_zeros(samples, int(counts.max()), *x.shape[1:])
        padded[self.owner[order], position] = x[order]
        return padded

    def per_row(self, values: Tensor, rows: int) -> Tensor:
        """[N, ...] -> [rows, ...]."""
        return values[self.owner]

    def sum_rows(self, values: Tensor, samples: int) -> Tensor:
        """[rows, ...] -> [N, ...]."""
        return values.new_zeros(samples, *values.shape[1:]).index_add_(0, self.owner, values)


def find_layout(plain: Tensor, scaled: Tensor, exponents: Tensor) -> Layout | None:
    """The layout that explains why gradients shrank as they did when sample i's loss was scaled by 2^exponents[i].

    None if no layout with whole axes does. Powers of two scale without rounding, so a wrong layout fits by no accident.
    """
    samples = len(exponents)
    size = plain.abs().max()
    for axis in range(plain.dim()):
        for layout in (Layout(axis), Layout(axis, interleaved=True)):
            if plain.shape[axis] == 0 or not layout.fits(plain.shape, samples):
                continue
            expected = layout.scale(plain, torch.exp2(exponents))
            if torch.allclose(scaled, expected, rtol=1e-2, atol=float(1e-4 * size)):
                return layout
    return None


def find_owners(plain: Tensor, scaled: list[Tensor]) -> Tensor | None:
    """For rows of axis 0: the sample of each, from gradients whose scaling (1 or 1/2) tells one bit of its number.

    None if some row is not scaled as a whole, so belongs to no one sample. Rows without gradient are given to sample 0.
    """
    if plain.dim() == 0 or plain.shape[0] == 0:
        return None
    flat = plain.reshape(plain.shape[0], -1)
    size, at = flat.abs().max(1)
    owner = torch.zeros(len(flat), dtype=torch.int64, device=plain.device)
    for bit, values in enumerate(scaled):
        rows = values.reshape(len(flat), -1)
        ratio = (rows.gather(1, at.unsqueeze(1)) / flat.gather(1, at.unsqueeze(1))).squeeze(1)
        halved = (ratio < 0.75) & (size > 0)
        expected = flat * torch.where(halved, 0.5, 1.0).to(flat.dtype).unsqueeze(1)
        if not torch.allclose(rows, expected, rtol=1e-2, atol=float(1e-4 * size.max())):
            return None
        owner += halved.long() << bit
    return owner
