"""persample_grad: each sample's weight gradient of a linear layer."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .. import _derive
from .._library import define
from ..reference import persample_dot as reference_dot
from ..reference import persample_grad as reference
from . import _linear_layer
from ._plain import kernel_or_reference


def _fake(inputs: Tensor, output_grads: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], output_grads.shape[2], inputs.shape[2])


def _with_dots(inputs: Tensor, output_grads: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    grads = reference.persample_grad(inputs, output_grads)
    return grads, reference_dot.persample_dot(inputs, output_grads, directions)


def _into(inputs: Tensor, output_grads: Tensor, directions: Tensor | None, out: Tensor) -> Tensor:
    if inputs.dtype == torch.promote_types(inputs.dtype, torch.float32):
        torch.bmm(output_grads.mT, inputs, out=out)
    else:
        out.copy_(reference.persample_grad(inputs, output_grads))
    if directions is None:
        return inputs.new_empty(inputs.shape[0], 0, dtype=torch.promote_types(inputs.dtype, torch.float32))
    return reference_dot.persample_dot(inputs, output_grads, directions)


def _fake_dots(inputs: Tensor, directions: Tensor | None) -> Tensor:
    K = 0 if directions is None else directions.shape[0]
    return inputs.new_empty(inputs.shape[0], K, dtype=torch.promote_types(inputs.dtype, torch.float32))


_persample_grad = define(
    "persample_grad(Tensor inputs, Tensor output_grads) -> Tensor",
    fake=_fake,
    reference=reference.persample_grad,
    triton="persample_grad",
)
_persample_grad_dots = define(
    "persample_grad_dots(Tensor inputs, Tensor output_grads, Tensor directions) -> (Tensor, Tensor)",
    fake=lambda a, b, directions: (_fake(a, b), _fake_dots(a, directions)),
    reference=_with_dots,
)
_persample_grad_into = define(
    "persample_grad_into(Tensor inputs, Tensor output_grads, Tensor? directions, Tensor(a!) out) -> Tensor",
    fake=lambda a, b, directions, out: _fake_dots(a, directions),
    reference=_into,
)


@overload
def persample_grad(
    inputs: Tensor, output_grads: Tensor, out: Tensor | None = None, *, directions: None = None
) -> Tensor: ...


@overload
def persample_grad(
    inputs: Tensor, output_grads: Tensor, out: Tensor | None = None, *, directions: Tensor
) -> tuple[Tensor, Tensor]: ...


def persample_grad(
    inputs: Tensor, output_grads: Tensor, out: Tensor | None = None, *, directions: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Weight gradient of each sample's loss in a linear layer z = a W^T: G_i = sum_t b_it a_it^T.

    Differentiable to every order, batched by torch.func.vmap and traced by torch.compile (by its definition there).
    Fresh memory costs more than the products when T is small: pass `out` where gradients are formed again and again.

    Args:
        inputs: a, [N, T, I], float32, float64, bfloat16 or float16; N samples of T positions.
        output_grads: b, [N, T, O], the gradient of each sample's loss at z; the inputs' dtype and device.
        out: [N, O, I] of the inputs' dtype, overwritten and returned; written in place if each sample's [O, I] is
            contiguous in it, else through a copy.
        directions: V, [K, O, I], any float dtype. With it, the dots <G_i, V_k> are formed as well, while G_i is in
            cache where that is the cheaper way; from the gradients before they are rounded to the inputs' dtype.

    Returns:
        [N, O, I] in the inputs' dtype, summed in float32 at least; with directions, also the dots [N, K], float32
        (float64 for float64 inputs). Zeros where T is 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match. Each names the argument and its value.

    Memory: the result, and on the CPU T (O + 16) numbers a thread. Inputs of any strides are read in place if a
        position's features are contiguous, else copied.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import persample_grad
        >>> inputs = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])  # two samples of one position
        >>> output_grads = torch.tensor([[[1.0, -1.0]], [[0.0, 2.0]]])
        >>> persample_grad(inputs, output_grads)[0]
        tensor([[ 1.,  2.],
                [-1., -2.]])
        >>> grads, dots = persample_grad(inputs, output_grads, directions=torch.ones(1, 2, 2))
        >>> dots
        tensor([[0.],
                [6.]])
    """
    _linear_layer.check_layer("persample_grad", inputs, output_grads)
    if directions is not None:
        _linear_layer.check_directions("persample_grad", directions, inputs, output_grads)
    if out is not None:
        _linear_layer.check_out("persample_grad", out, inputs, output_grads)
        return _write(inputs, output_grads, out, directions)
    if directions is None:
        return kernel_or_reference(_persample_grad, reference.persample_grad, inputs, output_grads)
    return kernel_or_reference(_persample_grad_dots, _with_dots, inputs, output_grads, directions)


def _write(
    inputs: Tensor, output_grads: Tensor, out: Tensor, directions: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    tensors = [x for x in (inputs, output_grads, out, directions) if x is not None]
    is_watched = _derive.is_transformed(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    if is_watched or not _has_dense_samples(out):
        if directions is None:
            return out.copy_(persample_grad(inputs, output_grads))
        grads, dots = persample_grad(inputs, output_grads, directions=directions)
        return out.copy_(grads), dots
    dots = _persample_grad_into(inputs, output_grads, directions, out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # the op is below autograd, which would not notice otherwise
    return out if directions is None else (out, dots)


def _has_dense_samples(out: Tensor) -> bool:
    O, I = out.shape[1:]  # noqa: E741 (the letters of the definition)
    return out.numel() == 0 or ((I == 1 or out.stride(2) == 1) and (O == 1 or out.stride(1) == I))
