"""Parameter dictionaries and the flat vectors that solvers work on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


@functools.cache
def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that vectors over parameters of this dtype have: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of products between vectors over these parameters: real, float32 at least."""
    return functools.reduce(torch.promote_types, {x.dtype for x in tensors}, torch.float32).to_real()


def vector_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of flat vectors over these parameters: the widest of theirs, float32 at least."""
    return functools.reduce(torch.promote_types, {wide_dtype(x.dtype) for x in tensors})


def as_real(rows: Tensor) -> Tensor:
    """[N, P] -> itself, or [N, 2 P] for complex numbers: products are those of real and imaginary parts."""
    return torch.view_as_real(rows.resolve_conj()).flatten(1) if rows.is_complex() else rows


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of tensors with a leading K in one matrix [K, P], in float32 at least."""
    dense = (tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors)
    return torch.cat([tensor.reshape(len(tensor), -1).to(wide_dtype(tensor.dtype)) for tensor in dense], 1)


def unstack(vectors: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of vectors [K, P], shaped and typed like the given tensors with a leading K (views where possible)."""
    return [piece.to(tensor.dtype) for piece, tensor in zip(shaped(vectors, like), like, strict=True)]


def shaped(vectors: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of vectors [K, P], shaped like the given tensors with a leading K: views where possible."""
    pieces = vectors.split([tensor.numel() for tensor in like], 1)
    return [piece.reshape(len(vectors), *tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def as_vectors(
    directions: Tensor | Mapping[str, Tensor], parameters: Mapping[str, Tensor], name: str, *, stacked: bool
) -> Tensor:
    """Directions, flat or as a dictionary shaped like the parameters, as vectors [K, P].

    stacked: whether they have a leading K; if not there is one direction, and K = 1.

    Raises ValueError if they do not fit the parameters; `name` is what the caller calls the directions.
    """
    count = sum(parameter.numel() for parameter in parameters.values())
    if isinstance(directions, Tensor):
        if directions.dim() != 1 + stacked or directions.shape[-1] != count:
            expected = f"(K, {count})" if stacked else f"({count},)"
            raise ValueError(f"{name} has shape {tuple(directions.shape)}, expected {expected}, one per parameter")
        if directions.is_complex() and not any(parameter.is_complex() for parameter in parameters.values()):
            raise TypeError(f"{name} has dtype {directions.dtype}, expected real numbers as the parameters are")
        return directions if stacked else directions[None]
    if not isinstance(directions, Mapping):
        kind = type(directions).__name__
        raise TypeError(f"{name} is a {kind}, expected a tensor or a dictionary of tensors")
    if set(directions) != set(parameters):
        different = sorted(map(str, set(directions) ^ set(parameters)))
        raise ValueError(f"{name} and the parameters differ in their names: {', '.join(different[:5])}")
    for key in parameters:
        if not isinstance(directions[key], Tensor):
            raise TypeError(f"{name}[{key!r}] is a {type(directions[key]).__name__}, expected a tensor")
        if stacked and not directions[key].dim():
            raise ValueError(f"{name}[{key!r}] has shape (), expected {('K', *parameters[key].shape)}")
    entries = {key: directions[key] if stacked else directions[key][None] for key in parameters}
    K = len(next(iter(entries.values()))) if stacked else 1
    for key, parameter in parameters.items():
        if entries[key].shape != (K, *parameter.shape):
            expected = str((K, *parameter.shape) if stacked else tuple(parameter.shape))
            raise ValueError(f"{name}[{key!r}] has shape {tuple(directions[key].shape)}, expected {expected}")
    return stack(list(entries.values()))


def as_dict(vectors: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors [K, P] as a dictionary shaped like the parameters, each entry with a leading K."""
    return dict(zip(parameters, unstack(vectors, list(parameters.values())), strict=True))
