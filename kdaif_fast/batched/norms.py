"""Group and layer normalisation whose backward pass has a derivative in closed form.

PyTorch differentiates that backward pass step by step: about thirty passes over memory, and a graph that is as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Norm(torch.autograd.Function):
    """Of [N, C, ...] in groups of channels, or of [..., C] in rows of C (groups = 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        if groups:
            N, C = x.shape[:2]
            y, mean, rstd = torch.native_group_norm(x, weight, bias, N, C, x[0, 0].numel(), groups, eps)
        else:
            y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        return *_NormGrad.apply(grads[0], x, weight, mean, rstd, ctx.groups), None, None


class _NormGrad(torch.autograd.Function):
    """Gradients in input, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, x, weight, mean, rstd)
        ctx.groups = groups
        grad, everything = grad.contiguous(), [True, True, True]
        if groups:
            N, C = x.shape[:2]
            return torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight, N, C, x[0, 0].numel(), groups, everything
            )
        # Of the bias PyTorch only looks at whether there is one.
        return torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, rstd, weight, weight, everything)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return *_derivative(ctx, cotangents, ctx.needs_input_grad[:3]), None, None, None


def norm_grad(
    node: Any, cotangents: Sequence[Tensor | None], wanted: Sequence[torch.Size | None]
) -> Sequence[Tensor | None]:
    """The rule of `_NormGrad`: a vector at a time, and only what is wanted."""
    saved, count = node.saved_tensors, len(next(c for c in cotangents if c is not None))
    shapes = (saved[1], saved[2], saved[2])
    given = [
        shape.new_zeros(()).expand(count, *shape.shape) if c is None else c
        for c, shape in zip(cotangents, shapes, strict=True)
    ]
    needed = [shape is not None for shape in wanted[:3]]
    rows = [_derivative(node, [c[k] for c in given], needed) for k in range(count)]
    gradients = [
        None if rows[0][i] is None else rows[0][i][None] if count == 1 else torch.stack([row[i] for row in rows])  # type: ignore[index,misc]
        for i in range(3)
    ]
    return [*gradients, *[None] * (len(wanted) - 3)]


def _derivative(ctx: Any, cotangents: Sequence[Tensor], needed: Sequence[bool]) -> Gradients:
    """Of S = <t, dx> + <u, dweight> + <v, dbias> in the gradient g that came in, the input x and the weight w.

    With n the normalised input, r the reciprocal deviation, <.> the mean over a group and the projection
    P(a) = r (a - <a> - n <a n>), the backward pass is dx = P(w g), dweight = sum g n, dbias = sum g, so that
    S = sum g (w P(t) + u n + v). P is symmetric, n changes by P of x's change, and r by -r^2 <n x'>; hence
    dS/dx = P(g u - r (<t n> w g + <w g n> t)) - r^2 (<t w g> - <t> <w g> - <t n> <w g n>) n.
    """
    g, x, weight, mean, rstd = ctx.saved_tensors
    t, u, v = cotangents
    groups = ctx.groups
    axes = (x.shape[0], groups, x.shape[1] // groups, -1) if groups else (-1, 1, x.shape[-1], 1)
    spread = (groups or 1, axes[2], 1)

    def grouped(tensor: Tensor) -> Tensor:
        return tensor.reshape(axes)

    w, u, v = (a.reshape(spread) for a in (weight, u, v))
    g, x, t = grouped(g), grouped(x), grouped(t)
    r, mean = (a.reshape(x.shape[0], spread[0], 1, 1) for a in (rstd, mean))
    n = x.sub(mean).mul_(r)

    def average(a: Tensor, b: Tensor | None = None) -> Tensor:
        rows = a.reshape(*a.shape[:2], -1)
        if b is None:
            return rows.mean(-1).reshape(r.shape)
        return torch.linalg.vecdot(rows, b.reshape(rows.shape)).reshape(r.shape) / rows.shape[-1]

    def projected(a: Tensor) -> Tensor:
        return torch.addcmul(a - average(a), n, average(a, n), value=-1).mul_(r)

    over = (0, 3)
    shape = ctx.saved_tensors[1].shape
    pt = projected(t) if needed[0] or needed[2] else None
    to_grad = to_input = to_weight = None
    if needed[0]:
        assert pt is not None
        to_grad = torch.addcmul(v, n, u).addcmul_(pt, w).reshape(shape)
    if needed[2]:
        assert pt is not None
        to_weight = (g * pt).sum(over).reshape(weight.shape)
    if needed[1]:
        wg = g * w
        tn, wgn = average(t, n), average(wg, n)
        along = average(t, wg) - average(t) * average(wg) - tn * wgn
        h = torch.addcmul(g * u, wg, r * tn, value=-1).addcmul_(t, r * wgn, value=-1)
        to_input = projected(h).addcmul_(n, r * r * along, value=-1).reshape(shape)
    return to_grad, to_input, to_weight


class _Replacing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.group_norm:
            return _group_norm(*args, **kwargs)
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _is_plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if weight is None or bias is None or not x.numel() or _is_recomputed():
        return False
    return x.dtype in (torch.float32, torch.float64) and weight.dtype == bias.dtype == x.dtype


def _is_recomputed() -> bool:
    """Whether somebody handles what is saved, as activation checkpointing does, which runs the layer again later on."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if x.dim() < 2 or x.shape[1] % groups or not _is_plain(x, weight, bias):
        return F.group_norm(x, groups, weight, bias, eps)
    return _Norm.apply(x.contiguous(), weight, bias, groups, eps)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if len(shape) != 1 or x.shape[-1:] != torch.Size(shape) or not _is_plain(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    return _Norm.apply(x.contiguous(), weight, bias, 0, eps)


@contextlib.contextmanager
def closed_form_norms(model: nn.Module) -> Iterator[None]:
    """Within it, group and layer normalisation in float32 and float64 are those of this file."""
    if not any(isinstance(module, (nn.GroupNorm, nn.LayerNorm)) for module in model.modules()):
        yield
        return
    with _Replacing():
        yield
