"""persample_conv: each sample's weight gradient of a convolution, its dot products with directions, and its norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._library import define
from ..reference import persample_conv as reference
from ._plain import kernel_or_reference


class ConvGrads(NamedTuple):
    """What persample_conv returns; None for what was not asked for."""

    grads: Tensor | None
    dots: Tensor | None
    squared_norms: Tensor | None


_persample_conv = define(
    "persample_conv(Tensor inputs, Tensor output_grads, Tensor? directions, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool grads, bool norms) -> (Tensor, Tensor, Tensor)",
    fake=reference.persample_conv,
    reference=reference.persample_conv,
)


def _out_reference(*args: Any) -> tuple[Tensor, Tensor]:
    *options, out = args
    G, dots, squared_norms = reference.persample_conv(*options[:8], True, options[8])
    out.copy_(G)
    return dots, squared_norms


_persample_conv_out = define(
    "persample_conv_out(Tensor inputs, Tensor output_grads, Tensor? directions, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool norms, Tensor(a!) out) -> (Tensor, Tensor)",
    fake=_out_reference,
    reference=_out_reference,
)


def persample_conv(
    inputs: Tensor,
    output_grads: Tensor,
    directions: Tensor | None = None,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    grads: bool = False,
    norms: bool = False,
    out: Tensor | None = None,
) -> ConvGrads:
    """[N, C, *S], [N, O, *positions] -> G [N, O, C / groups, *kernel], <G_i, V_k> [N, K], ||G_i||^2 [N]."""
    result = kernel_or_reference(
        _persample_conv,
        reference.persample_conv,
        inputs,
        output_grads,
        directions,
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        grads or out is not None,
        norms,
    )
    G = result[0] if out is None else out.copy_(result[0])
    return ConvGrads(
        G if grads or out is not None else None, None if directions is None else result[1], result[2] if norms else None
    )
