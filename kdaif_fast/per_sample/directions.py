"""Directions in the parameters, as users give them: one or several, flat or as dictionaries."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def read_directions(
    direction: Tensor | Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], bool]:
    """Directions stacked along a first axis, {name: [K, *shape]}, and whether only one was given (K = 1).

    Raises ValueError if they do not fit the parameters, naming the entries.
    """
    if isinstance(direction, Tensor):
        count = sum(parameter.numel() for parameter in parameters.values())
        if direction.dim() not in (1, 2) or direction.shape[-1] != count:
            raise ValueError(
                f"direction has shape {tuple(direction.shape)}, expected ({count},), one per parameter, or (K, {count})"
            )
        rows = direction.detach().reshape(-1, count)
        leaves = list(parameters.values())
        pieces = rows.split([leaf.numel() for leaf in leaves], 1)
        shaped = [piece.reshape(len(rows), *leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return dict(zip(parameters, shaped, strict=True)), direction.dim() == 1
    if not isinstance(direction, Mapping):
        raise TypeError(f"direction is a {type(direction).__name__}, expected a tensor or a dictionary of tensors")
    missing, surplus = sorted(set(parameters) - set(direction)), sorted(set(direction) - set(parameters))
    if missing or surplus:
        parts = [f"lacks {', '.join(missing[:5])}"] if missing else []
        parts += [f"has {', '.join(map(str, surplus[:5]))}, which are no chosen parameters"] if surplus else []
        raise ValueError(f"direction {' and '.join(parts)}")
    for name in parameters:
        if not isinstance(direction[name], Tensor):
            raise TypeError(f"direction[{name!r}] is a {type(direction[name]).__name__}, expected a tensor")
    stacked = {name: direction[name].shape != parameter.shape for name, parameter in parameters.items()}
    counts = set()
    for name, parameter in parameters.items():
        shape = tuple(direction[name].shape)
        if shape != tuple(parameter.shape) and shape[1:] != tuple(parameter.shape):
            raise ValueError(
                f"direction[{name!r}] has shape {shape}, expected {tuple(parameter.shape)} as the parameter, or that "
                "with a leading axis of K directions"
            )
        if stacked[name]:
            counts.add(shape[0])
    if not counts:
        return {name: direction[name].detach().unsqueeze(0) for name in parameters}, True
    if not all(stacked.values()) or len(counts) != 1:
        shapes = {name: tuple(direction[name].shape) for name in list(parameters)[:5]}
        raise ValueError(f"direction has entries with different numbers of directions: {shapes}")
    return {name: direction[name].detach() for name in parameters}, False
