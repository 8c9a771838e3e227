"""Parameter dictionaries and the flat vectors that solvers work on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that vectors over parameters of this dtype have: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of products between vectors over these parameters: real, float32 at least."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32).to_real()


def as_real(rows: Tensor) -> Tensor:
    """[N, P] -> itself, or [N, 2 P] for complex numbers: products are those of real and imaginary parts."""
    return torch.view_as_real(rows.resolve_conj()).flatten(1) if rows.is_complex() else rows


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one vector [P], in float32 at least."""
    dense = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors)
    return torch.cat([tensor.reshape(-1).to(wide_dtype(tensor.dtype)) for tensor in dense])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a vector [P], shaped and typed like the given tensors (views where the dtype is the same)."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, like, strict=True)]


def as_vector(direction: Tensor | Mapping[str, Tensor], parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """A direction, given flat [P] or as a dictionary shaped like the parameters, as a flat vector.

    Raises ValueError if it does not fit the parameters; `name` is what the caller calls the direction.
    """
    count = sum(parameter.numel() for parameter in parameters.values())
    if isinstance(direction, Tensor):
        if direction.shape != (count,):
            raise ValueError(f"{name} has shape {tuple(direction.shape)}, expected ({count},), one per parameter")
        return direction
    if set(direction) != set(parameters):
        different = sorted(set(direction) ^ set(parameters))
        raise ValueError(f"{name} and the parameters differ in their names: {', '.join(different[:5])}")
    for key, parameter in parameters.items():
        if direction[key].shape != parameter.shape:
            shapes = f"{tuple(direction[key].shape)}, expected {tuple(parameter.shape)}"
            raise ValueError(f"{name}[{key!r}] has shape {shapes} as the parameter")
    return flatten([direction[key] for key in parameters])


def as_dict(vector: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector [P] as a dictionary shaped like the parameters."""
    return dict(zip(parameters, unflatten(vector, list(parameters.values())), strict=True))
