"""Directions in the parameters, as users give them: one or several, flat or as dictionaries."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .._model import plain_name


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
        leaves = list(parameters.values())
        elsewhere = {leaf.device for leaf in leaves} - {direction.device}
        if elsewhere:
            raise ValueError(f"direction is on {direction.device}, expected {elsewhere.pop()} as the parameters")
        rows = direction.detach().reshape(-1, count)
        pieces = rows.split([leaf.numel() for leaf in leaves], 1)
        shaped = [piece.reshape(len(rows), *leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return dict(zip(parameters, shaped, strict=True)), direction.dim() == 1
    if not isinstance(direction, Mapping):
        hint = ""
        if isinstance(direction, tuple):  # a Solution, or all that influence_scores returned
            hint = ": of phi, solution = influence_scores(..., return_solution=True) it is solution.x"
        kind = type(direction).__name__
        raise TypeError(f"direction is a {kind}, expected a tensor or a dictionary of tensors{hint}")
    own_names = {plain_name(name): name for name in parameters}  # with what torch.compile added, if it did
    direction = {own_names.get(plain_name(str(name)), name): entry for name, entry in direction.items()}
    missing, surplus = parameters.keys() - direction.keys(), direction.keys() - parameters.keys()
    if missing or surplus:
        parts = [f"lacks {', '.join(sorted(missing)[:5])}"] if missing else []
        parts += [f"has {', '.join(sorted(map(str, surplus))[:5])}, which are no chosen parameters"] if surplus else []
        raise ValueError(f"direction {' and '.join(parts)}")
    for name, parameter in parameters.items():
        _check_entry(name, direction[name], parameter)
    if all(direction[name].shape == parameter.shape for name, parameter in parameters.items()):
        return {name: _without_graph(direction[name]).unsqueeze(0) for name in parameters}, True
    if len({direction[name].shape[:1] for name in parameters}) != 1 or any(
        direction[name].shape == parameter.shape for name, parameter in parameters.items()
    ):
        shapes = {name: tuple(direction[name].shape) for name in list(parameters)[:5]}
        raise ValueError(f"direction has entries with different numbers of directions: {shapes}")
    return {name: _without_graph(direction[name]) for name in parameters}, False


def _without_graph(entry: Tensor) -> Tensor:
    return entry.detach() if entry.requires_grad else entry


def _check_entry(name: str, entry: Tensor, parameter: Tensor) -> None:
    if not isinstance(entry, Tensor):
        raise TypeError(f"direction[{name!r}] is a {type(entry).__name__}, expected a tensor")
    if entry.device != parameter.device:
        raise ValueError(f"direction[{name!r}] is on {entry.device}, expected {parameter.device} as the parameter")
    if entry.shape != parameter.shape and entry.shape[1:] != parameter.shape:
        raise ValueError(
            f"direction[{name!r}] has shape {tuple(entry.shape)}, expected {tuple(parameter.shape)} as the parameter, "
            "or that with a leading axis of K directions"
        )
