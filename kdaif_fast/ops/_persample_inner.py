"""persample_inner: sums of products, sample by sample, as other ops and terms need them on a GPU."""

from __future__ import annotations

from torch import Tensor

from .._library import define
from ..reference import persample_inner as reference

_persample_inner = define(
    "persample_inner(Tensor left, Tensor right) -> Tensor",
    fake=reference.persample_inner,
    reference=reference.persample_inner,
    triton="persample_inner",
)


def persample_inner(left: Tensor, right: Tensor) -> Tensor:
    """[N, K, *S], [N, *S], both of one dtype -> sum over S of left * right: [N, K], float32 at least.

    Products are formed and summed in float32, or float64 for such tensors. Not differentiable, nothing is checked.
    """
    result: Tensor = _persample_inner(left, right)
    return result
