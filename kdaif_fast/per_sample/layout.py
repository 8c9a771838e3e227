"""Where the samples of a batch are in a tensor: along which axis, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples along one axis of N * k rows: k successive rows a sample, or (interleaved) every N-th row.

    [N, T, d] has axis 0 and k = 1; flattened to [N * T, d], k = T; [T, N, d] has axis 1, flattened it is interleaved.
    """

    axis: int
    interleaved: bool = False
    certain: bool = field(default=True, compare=False)  # whether no other layout explains the same gradients
    single: bool = field(default=False, compare=False)  # whether it was found where k = 1, which tells no order

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether a tensor of this shape can have N samples so."""
        if len(shape) <= self.axis:
            return False
        return shape[self.axis] == samples if self.single else shape[self.axis] % samples == 0

    def per_sample(self, x: Tensor, samples: int) -> Tensor:
        """[N, k, other axes in their order], a view where x allows it."""
        if self.axis:
            x = x.movedim(self.axis, 0)
        if x.shape[0] == samples:
            return x.unsqueeze(1)
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
    """Rows in any order and number: which sample each belongs to is in a tensor, shaped like the leading axes.

    Tokens that a router has gathered by expert, or a packed sequence, are laid out so; with experts that have slots,
    there are two leading axes.
    """

    def __init__(self, owner: Tensor) -> None:
        super().__init__(0)
        object.__setattr__(self, "owner", owner)

    owner: Tensor

    def __repr__(self) -> str:
        return f"Scattered({self.owner})"

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether there is an owner for every row."""
        return shape[: self.owner.dim()] == self.owner.shape

    def per_sample(self, x: Tensor, samples: int) -> Tensor:
        """[N, k, ...] with k the most rows that a sample has; samples with fewer are filled up with zeros."""
        x, owner = x.flatten(0, self.owner.dim() - 1), self.owner.flatten()
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=samples)
        first = counts.cumsum(0) - counts
        position = torch.arange(len(order), device=x.device) - first[owner[order]]
        padded = x.new_zeros(samples, int(counts.max()), *x.shape[1:])
        padded[owner[order], position] = x[order]
        return padded

    def per_row(self, values: Tensor, rows: int) -> Tensor:
        """[N, ...] -> [rows, ...]."""
        return values[self.owner]

    def scale(self, x: Tensor, weights: Tensor) -> Tensor:
        """x with every sample's part times its weight."""
        by_row = weights[self.owner].to(x.dtype)
        return x * by_row.reshape(*by_row.shape, *[1] * (x.dim() - by_row.dim()))

    def sum_rows(self, values: Tensor, samples: int) -> Tensor:
        """[rows, ...] -> [N, ...]."""
        rows = values.flatten(0, self.owner.dim() - 1)
        return rows.new_zeros(samples, *rows.shape[1:]).index_add_(0, self.owner.flatten(), rows)


def find_layouts(plain: Tensor, scaled: Tensor, exponents: Tensor) -> list[Layout]:
    """The layouts that explain why gradients shrank as they did when sample i's loss was scaled by 2^exponents[i].

    None of them if no order along one axis does; more than one only where most gradients are zero. Powers of two scale
    without rounding, so a wrong layout fits by no accident.
    """
    samples = len(exponents)
    found: list[Layout] = []
    for axis in range(plain.dim()):
        for layout in (Layout(axis), Layout(axis, interleaved=True)):
            if plain.shape[axis] == 0 or not layout.fits(plain.shape, samples):
                continue
            if layout.interleaved and plain.shape[axis] == samples:  # the same then
                continue
            if explains(layout, plain, scaled, torch.exp2(exponents)):
                found.append(replace(layout, single=plain.shape[axis] == samples))
    return found


def explains(layout: Layout, plain: Tensor, scaled: Tensor, factors: Tensor) -> bool:
    """Whether scaling the samples' losses by these factors has scaled a tensor's gradient as the layout says."""
    return torch.allclose(scaled, layout.scale(plain, factors), rtol=1e-2, atol=_noise(plain))


def uncertain(layout: Layout) -> Layout:
    """The layout, marked as one of several."""
    return replace(layout, certain=False)


def _noise(gradient: Tensor) -> float:
    """What a sum in another order may change."""
    return min(1e-4, 64 * torch.finfo(gradient.dtype).eps) * float(gradient.abs().max())


def find_owners(plain: Tensor, scaled: list[Tensor], axes: int = 1) -> Tensor | None:
    """For rows along the leading axes: the sample of each, from gradients whose scaling (1 or 1/2) tells one bit of it.

    None if some row is not scaled as a whole, so belongs to no one sample. Rows without gradient are given to sample 0.
    """
    if plain.dim() < axes or plain.numel() == 0:
        return None
    flat = plain.reshape(plain.shape[:axes].numel(), -1)
    size, at = flat.abs().max(1)
    owner = torch.zeros(len(flat), dtype=torch.int64, device=plain.device)
    for bit, values in enumerate(scaled):
        rows = values.reshape(len(flat), -1)
        ratio = (rows.gather(1, at.unsqueeze(1)).abs() / flat.gather(1, at.unsqueeze(1)).abs()).squeeze(1)
        halved = (ratio < 0.75) & (size > 0)
        expected = flat * torch.where(halved, 0.5, 1.0).to(flat.dtype).unsqueeze(1)
        if not torch.allclose(rows, expected, rtol=1e-2, atol=_noise(plain)):
            return None
        owner += halved.long() << bit
    return owner.view(plain.shape[:axes])
