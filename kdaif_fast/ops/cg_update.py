"""cg_update, cg_dots: the passes over memory of conjugate gradients, for K right-hand sides with their own scalars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _derive
from .._library import define
from ..reference import cg_update as reference
from . import _check

# The ops themselves, for loops that have checked their arguments once: the checks below cost as much as a small pass.
CG_UPDATE = define(
    "cg_update(Tensor(a!) x, Tensor(b!) r, Tensor p, Tensor Ap, Tensor steps, float damping, Tensor(c!)? best, "
    "Tensor? keep) -> Tensor",
    fake=lambda x, r, p, Ap, steps, damping, best, keep: x.new_empty(x.shape[0]),
    reference=reference.cg_update,
    triton="cg_update",
)
CG_DOTS = define(
    "cg_dots(Tensor p, Tensor q) -> Tensor",
    fake=lambda p, q: p.new_empty(2, p.shape[0]),
    reference=reference.cg_dots,
    triton="cg_update",
)


def cg_update(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    Ap: Tensor,
    steps: Tensor,
    damping: float = 0.0,
    *,
    best: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """x += a p and r -= a (A p + damping p) in place, in one pass over memory; returns r . r of every right-hand side.

    Not differentiable; under autograd, a transform or a compiler its definition in plain torch stands in.

    Args:
        x: iterates [K, P], float32 or float64, overwritten; rows contiguous.
        r: residuals [K, P], overwritten; rows contiguous. The dtype, device and shape of x, as all vectors.
        p: directions [K, P].
        Ap: products with them [K, P], without the damping.
        steps: a, [K], in the dtype of x. Where it is 0, x and r stay as they are, whatever p and Ap hold.
        damping: added to every eigenvalue of A.
        best: [K, P], rows contiguous. Its rows are overwritten with those of x before the update where `keep` is true.
        keep: bool [K].

    Returns:
        r . r [K] after the update, in the dtype of x; summed in float64 on the CPU, in the same order for any number of
        threads.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device. Each names it and its value.

    Memory: [K] numbers, and on the CPU one float64 for every 8,192 elements.

    Source: Hestenes and Stiefel 1952, equations 3:1b and 3:1c.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import cg_update
        >>> x, r, p = torch.zeros(1, 2), torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 4.0]])
        >>> cg_update(x, r, p, 2 * p, torch.tensor([0.25]), damping=1.0), x, r
        (tensor([1.2500]), tensor([[0.5000, 1.0000]]), tensor([[0.5000, 1.0000]]))
    """
    _check_vectors("cg_update", "x", x, x)
    _check_vectors("cg_update", "r", r, x)
    _check_vectors("cg_update", "p", p, x)
    _check_vectors("cg_update", "Ap", Ap, x)
    _check_scalars("steps", steps, x, x.dtype)
    _check.is_finite("cg_update", "damping", damping)
    if (best is None) != (keep is None):
        missing = "best" if best is None else "keep"
        raise ValueError(f"cg_update: {missing} is None, expected a tensor as best and keep go together")
    if best is not None:
        _check_vectors("cg_update", "best", best, x)
        _check_scalars("keep", keep, x, torch.bool)
    written = [x, r] if best is None else [x, r, best]
    for name, vectors in zip(("x", "r", "best"), written, strict=False):
        if vectors.stride(1) != 1 and vectors.shape[1] > 1:
            raise ValueError(f"cg_update: {name} has strides {vectors.stride()}, expected contiguous rows")
    if _is_watched(*written, p, Ap, steps):
        return reference.cg_update(x, r, p, Ap, steps, damping, best, keep)
    squares: Tensor = CG_UPDATE(x, r, p, Ap, steps, float(damping), best, keep)
    for vectors in written:
        if not vectors.is_inference():
            torch.autograd.graph.increment_version(vectors)  # the op is below autograd, which would not notice
    return squares


def cg_dots(p: Tensor, q: Tensor) -> Tensor:
    """The products p . q and p . p of every row, in one pass over memory: what a Rayleigh quotient needs.

    Not differentiable; under autograd, a transform or a compiler its definition in plain torch stands in.

    Args:
        p: [K, P], float32 or float64.
        q: [K, P], the dtype and device of p.

    Returns:
        [2, K] in the dtype of p, summed in float64 on the CPU, in the same order for any number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device. Each names it and its value.

    Memory: as cg_update.

    Example:
        >>> import torch
        >>> from kdaif_fast.ops import cg_dots
        >>> cg_dots(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist()
        [[11.0], [5.0]]
    """
    _check_vectors("cg_dots", "p", p, p)
    _check_vectors("cg_dots", "q", q, p)
    if _is_watched(p, q):
        return reference.cg_dots(p, q)
    dots: Tensor = CG_DOTS(p, q)
    return dots


def _is_watched(*tensors: Tensor) -> bool:
    is_recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return is_recorded or _derive.is_transformed(*tensors)


def _check_vectors(op: str, name: str, value: Any, x: Any) -> None:
    _check.is_tensor(op, name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected float32 or float64")
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected [K, P]")
    if value is x:
        return
    first = "p" if op == "cg_dots" else "x"
    if value.dtype != x.dtype:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected {x.dtype} as {first}")
    _check.is_like(op, name, value, x.shape, first, x.device)


def _check_scalars(name: str, value: Any, x: Tensor, dtype: torch.dtype) -> None:
    _check.is_like("cg_update", name, value, x.shape[:1], "the number of rows of x", x.device)
    if value.dtype != dtype:
        raise TypeError(f"cg_update: {name} has dtype {value.dtype}, expected {dtype}")
