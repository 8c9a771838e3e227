"""persample_conv: each sample's weight gradient of a convolution, its dot products with directions, and its norm."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._library import define
from ..reference import persample_conv as reference
from . import _check, _conv_by_torch
from ._plain import kernel_or_reference

OP = "persample_conv"


class ConvGrads(NamedTuple):
    """What persample_conv returns; None for what was not asked for."""

    grads: Tensor | None
    dots: Tensor | None
    squared_norms: Tensor | None


def _out_reference(
    inputs: Tensor,
    output_grads: Tensor,
    directions: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    norms: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    G, dots, squared_norms = reference.persample_conv(
        inputs, output_grads, directions, kernel, stride, padding, dilation, groups, True, norms
    )
    out.copy_(G)
    return dots, squared_norms


_GEOMETRY = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"
_persample_conv = define(
    f"persample_conv(Tensor inputs, Tensor output_grads, Tensor? directions, {_GEOMETRY}, bool grads, bool norms) -> "
    "(Tensor, Tensor, Tensor)",
    fake=reference.persample_conv,
    reference=reference.persample_conv,
    composed=_conv_by_torch.persample_conv,
)
_persample_conv_out = define(
    f"persample_conv_out(Tensor inputs, Tensor output_grads, Tensor? directions, {_GEOMETRY}, bool norms, "
    "Tensor(a!) out) -> (Tensor, Tensor)",
    fake=_out_reference,
    reference=_out_reference,
    composed=_conv_by_torch.persample_conv_out,
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
    """Each sample's weight gradient G_i of a convolution; or only <G_i, V_k> and ||G_i||^2, without storing G.

    With U_i the patches of sample i, one column a position, G_i = b_i U_i^T, group by group. On the CPU no patches are
    built, and dots and norms are taken while a part of G_i is in the cache. On a GPU the vendor's library answers: dots
    are <b_i, conv(x_i; V_k)>. The gradient of a transposed convolution is the same with inputs and output_grads
    exchanged.

    On the CPU the kernel is not differentiable; where a derivative may be asked for (an argument requires grad, or a
    transform or compiler is at work) the definition in plain torch answers, differentiable in every tensor.

    Args:
        inputs: [N, C, *S], the layer's inputs; 1 to 3 spatial axes; float32, float64, bfloat16 or float16. Any strides.
        output_grads: [N, O, *positions], the gradient of each sample's loss at the layer's outputs; dtype and device of
            the inputs. Any strides.
        directions: [K, O, C / groups, *kernel] of any float dtype; used in float32, or float64 for float64 inputs; on a
            GPU in the inputs' dtype, whose digits the dots then have, or TF32 where torch allows it to convolutions.
        kernel: the kernel's size along each axis.
        stride: as for the convolution, one number an axis; so are padding and dilation.
        padding: zeros on both sides of each axis.
        dilation: distance of the kernel's elements.
        groups: a divisor of C and O.
        grads: whether G is wanted.
        norms: whether the squared norms are wanted.
        out: [N, O, C / groups, *kernel] of the inputs' dtype: G is written into it and returned. Nothing is copied if
            each sample's part is contiguous, be it in wider rows.

    Returns:
        ConvGrads: grads [N, O, C / groups, *kernel] in the inputs' dtype if `grads` or `out`; dots [N, K] if
        directions were given; squared_norms [N] (squares: they are summed over layers) if `norms`. Sums are formed and
        the last two returned in float32, or float64 for float64 inputs. What was not asked for is None.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not belong together. Each names the argument and its value.

    Memory (CPU): G if asked for without `out`, one copy of the directions, (K + 1) numbers for every 16 or 32 output
        channels of a sample, and per thread one padded sample of one group and 32 rows of G.
    Memory (GPU): G if asked for without `out`; for dots, as much as output_grads for each direction, 2^26 numbers at
        most unless one direction takes more; for G and norms the patches of some samples, 2^25 numbers at most unless
        one sample takes more, and as many products.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import persample_conv
        >>> inputs, output_grads = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0]]])
        >>> options = dict(kernel=[2], stride=[1], padding=[0], dilation=[1])
        >>> persample_conv(inputs, output_grads, grads=True, **options).grads
        tensor([[[[21., 32.]]]])
        >>> persample_conv(inputs, output_grads, torch.tensor([[[[1.0, -1.0]]]]), norms=True, **options)
        ConvGrads(grads=None, dots=tensor([[-11.]]), squared_norms=tensor([1465.]))
    """
    kernel, stride, padding, dilation = list(kernel), list(stride), list(padding), list(dilation)
    shape = _check_arguments(inputs, output_grads, kernel, stride, padding, dilation, groups)
    if directions is not None:
        _check.is_floating(OP, "directions", directions, f"[K, {', '.join(map(str, shape[1:]))}]")
        count = len(directions) if directions.dim() else 0
        _check.is_like(OP, "directions", directions, (count, *shape[1:]), "[K, O, C / groups, *kernel]", inputs.device)
        directions = directions.to(torch.promote_types(inputs.dtype, torch.float32))
    geometry = (kernel, stride, padding, dilation, groups)
    if out is not None:
        _check_out(out, shape, inputs)
        if _samples_are_dense(out):
            dots, squared_norms = kernel_or_reference(
                _persample_conv_out, _out_reference, inputs, output_grads, directions, *geometry, norms, out
            )
            G = out
        else:
            G, dots, squared_norms = kernel_or_reference(
                _persample_conv, reference.persample_conv, inputs, output_grads, directions, *geometry, True, norms
            )
            G = out.copy_(G)
    else:
        G, dots, squared_norms = kernel_or_reference(
            _persample_conv, reference.persample_conv, inputs, output_grads, directions, *geometry, grads, norms
        )
    return ConvGrads(
        G if grads or out is not None else None,
        None if directions is None else dots,
        squared_norms if norms else None,
    )


def _check_arguments(
    inputs: Tensor,
    output_grads: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, ...]:
    """The shape of G, of arguments that make sense."""
    _check.is_floating(OP, "inputs", inputs, "[N, C, *S]")
    _check.is_floating(OP, "output_grads", output_grads, "[N, O, *positions]")
    axes = inputs.dim() - 2
    if axes not in (1, 2, 3):
        raise ValueError(f"{OP}: inputs has shape {tuple(inputs.shape)}, expected [N, C, *S] with 1 to 3 spatial axes")
    lists = {"kernel": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
    for name, (value, least) in lists.items():
        if len(value) != axes:
            raise ValueError(
                f"{OP}: {name} is {reprlib.repr(value)}, expected {axes} numbers, one for each axis of inputs"
            )
        for i, number in enumerate(value):
            _check.is_integer(OP, f"{name}[{i}]", number, least=least)
    _check.is_integer(OP, "groups", groups, least=1)
    if output_grads.dtype != inputs.dtype:
        raise TypeError(f"{OP}: output_grads has dtype {output_grads.dtype}, expected {inputs.dtype} as inputs")
    if output_grads.device != inputs.device:
        raise ValueError(f"{OP}: output_grads is on device {output_grads.device}, expected {inputs.device} as inputs")
    _check_positions(inputs, output_grads, kernel, stride, padding, dilation)
    N, C, O = inputs.shape[0], inputs.shape[1], output_grads.shape[1]  # noqa: E741
    for name, channels in [("inputs", C), ("output_grads", O)]:
        if channels == 0 or channels % groups != 0:
            raise ValueError(f"{OP}: {name} has {channels} channels, expected a positive multiple of groups, {groups}")
    return (N, O, C // groups, *kernel)


def _check_positions(
    inputs: Tensor, output_grads: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    most = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(inputs.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    shape = tuple(output_grads.shape)
    # The output padding of a transposed convolution, which may be as large as the dilation, can cost some positions.
    fits = len(shape) == inputs.dim() and all(
        max(1, m - (d - 1) // s) <= size <= m for size, m, s, d in zip(shape[2:], most, stride, dilation, strict=True)
    )
    if not fits or shape[0] != inputs.shape[0]:
        expected = ", ".join(map(str, (inputs.shape[0], "O", *most)))
        raise ValueError(
            f"{OP}: output_grads has shape {shape}, expected [{expected}] for inputs of {tuple(inputs.shape)}"
        )


def _check_out(out: Tensor, shape: tuple[int, ...], inputs: Tensor) -> None:
    _check.is_like(OP, "out", out, shape, "[N, O, C / groups, *kernel]", inputs.device)
    if out.dtype != inputs.dtype:
        raise TypeError(f"{OP}: out has dtype {out.dtype}, expected {inputs.dtype} as inputs")


def _samples_are_dense(out: Tensor) -> bool:
    """Whether each sample's part is contiguous and no two overlap."""
    size = 1
    for length, step in zip(reversed(out.shape[1:]), reversed(out.stride()[1:]), strict=True):
        if length != 1 and step != size:
            return False
        size *= length
    return out.shape[0] <= 1 or out.stride(0) >= size
