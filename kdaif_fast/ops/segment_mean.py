"""segment_mean: the mean of rows per sequence, class or domain. Plain torch: its cost is nothing beside the logits'."""

from __future__ import annotations

import reprlib
from typing import Any, overload

import torch
from torch import Tensor

from .. import _derive
from . import _check
from ._row_stats import RowStats


@overload
def segment_mean(
    values: Tensor, segments: Tensor, count: int | None = None, weight: Tensor | None = None
) -> Tensor: ...


@overload
def segment_mean(
    values: RowStats, segments: Tensor, count: int | None = None, weight: Tensor | None = None
) -> RowStats: ...


def segment_mean(
    values: Tensor | RowStats, segments: Tensor, count: int | None = None, weight: Tensor | None = None
) -> Tensor | RowStats:
    """Weighted mean of the rows of each segment: sum of weight * value over sum of weight.

    A segment is whatever the rows are grouped by: the sequence a token belongs to, a class, a domain. Sums are formed
    in float64. Differentiable in tensor values and weight, for what that is worth to the caller.

    Args:
        values: [...] float or bool (whose mean is a share), or RowStats: then every field but the arg-maxima, whose
            mean has no meaning.
        segments: int64 [...], 0 <= segment < count, in any order.
        count: number of segments. Default: the largest there is + 1 (looks at the values, so waits for a GPU, and must
            be given under torch.compile and vmap).
        weight: [...] bool or float, 0 or above. A row of weight 0 is left out, even if its value is NaN: `labels !=
            ignore_index` leaves ignored rows out. Default 1.

    Returns:
        [count], the values' dtype (float32 for bool); RowStats of such for RowStats, arg-maxima None. NaN for a segment
        without rows, or whose weights sum to 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, a negative count, segments out of range (on the CPU; on a GPU
            such rows count nowhere). Each names the argument and its value.

    Memory: a few float64 per row.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import segment_mean
        >>> segment_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]))
        tensor([1., nan, 4.])
    """
    _check_segments(values, segments, count)
    if count is None:
        count = int(segments.max()) + 1 if segments.numel() else 0
    _check_weight(segments, weight)
    inside = (segments >= 0) & (segments < count)
    if segments.device.type == "cpu" and not _derive.is_transformed(segments):
        _check_segment_values(segments, inside, count)
    # Rows of no segment go to a last one, which nobody sees.
    slots = torch.where(inside, segments, count).reshape(-1)
    wide = None if weight is None else weight.reshape(-1).double()
    if not isinstance(values, RowStats):
        return _mean(values, slots, count, wide)
    means = {
        name: None if field is None or name.endswith("_argmax") else _mean(field, slots, count, wide)
        for name, field in values._asdict().items()
    }
    return RowStats(**means)


def _mean(values: Tensor, slots: Tensor, count: int, weight: Tensor | None) -> Tensor:
    wide = values.reshape(-1).double()
    if weight is None:
        weight = torch.ones_like(wide)
    else:
        wide = torch.where(weight == 0, 0, wide)
    totals = [wide.new_zeros(count + 1).index_add(0, slots, x)[:count] for x in (weight * wide, weight)]
    return (totals[0] / totals[1]).to(values.dtype if values.is_floating_point() else torch.float32)


def _check_segments(values: Any, segments: Any, count: Any) -> None:
    if isinstance(values, RowStats):
        fields = [(f"values.{name}", field) for name, field in values._asdict().items() if field is not None]
    else:
        fields = [("values", values)]
    _check.is_tensor("segment_mean", "segments", segments)
    for name, field in fields:
        _check.is_like("segment_mean", name, field, segments.shape, "segments", segments.device)
        if not (field.is_floating_point() or field.dtype == torch.bool or name.endswith("_argmax")):
            raise TypeError(f"segment_mean: {name} has dtype {field.dtype}, expected a floating-point dtype or bool")
    if segments.dtype != torch.int64:
        raise TypeError(f"segment_mean: segments have dtype {segments.dtype}, expected torch.int64")
    if count is not None and (isinstance(count, bool) or not isinstance(count, (int, torch.SymInt))):
        raise TypeError(f"segment_mean: count is {reprlib.repr(count)} ({type(count).__name__}), expected an integer")
    if count is not None and count < 0:
        raise ValueError(f"segment_mean: count is {count}, expected 0 or more")


def _check_weight(segments: Tensor, weight: Any) -> None:
    if weight is None:
        return
    _check.is_like("segment_mean", "weight", weight, segments.shape, "segments", segments.device)
    if not (weight.is_floating_point() or weight.dtype == torch.bool):
        raise TypeError(f"segment_mean: weight has dtype {weight.dtype}, expected a floating-point dtype or bool")


def _check_segment_values(segments: Tensor, inside: Tensor, count: int) -> None:
    outside = (~inside).nonzero()
    if len(outside):
        index = tuple(outside[0].tolist())
        at = ", ".join(map(str, index))
        raise ValueError(f"segment_mean: segments[{at}] is {int(segments[index])}, expected 0 <= segment < {count}")
