"""The randomised Nystrom approximation: as an inverse, and as a preconditioner of conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .solution import Solution
from .system import Products, System, check_count, check_limits, products_of

BLOCK = 32  # vectors of a sketch that are multiplied at once


class Sketch(NamedTuple):
    """C ~ U^T diag(values) U with orthonormal rows U."""

    vectors: Tensor
    """U [rank, P]."""
    values: Tensor
    """[rank], float64, falling, none negative."""
    is_indefinite: bool
    """Whether C showed negative curvature, which the approximation cannot have."""

    def apply(self, rows: Tensor, inside: Tensor, outside: float) -> Tensor:
        """U^T diag(inside) U + outside (1 - U^T U) times every row."""
        coefficients = (rows @ self.vectors.T) * (inside - outside).to(rows)
        return outside * rows + coefficients @ self.vectors


def nystrom(
    operator: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 500,
    rank: int = 50,
    seed: int = 0,
) -> Solution:
    """(N + damping I)^-1 b for a randomised low-rank approximation N of C, by the Woodbury identity.

    Good where few eigenvalues of C are above the damping; see its residual.

    Args:
        operator: C, positive semi-definite: an object with `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides [P] or [K, P], float32 or float64; the approximation serves all of them.
        damping: what is added to every eigenvalue of C, > 0: outside of the subspace the inverse is 1 / damping.
        tol: the relative residual that counts as converged.
        max_iter: the most products to spend: bounds the rank.
        rank: random vectors that C is multiplied with.
        seed: of the random vectors.

    Returns:
        The solution with its true residual, which takes one more product. The reason is "rank" above tol. details:
        "rank" (of N, in which eigenvalues that are rounding do not count), "eigenvalues" of N, "indefinite" (whether C
        showed negative curvature, which N cannot have).

    Raises:
        ValueError: damping is 0.
        TypeError, ValueError: b is no vectors, or a number is no number or out of its range.

    Memory: 4 rank P numbers, and what the operator needs for 32 vectors.

    Source: Frangella, Tropp and Udell 2021 (arXiv 2110.02820), algorithm 2.1; Hataya and Yamada 2023 for influence.

    Example:
        >>> import torch
        >>> a = torch.tensor([3.0, 4.0, 0.0])
        >>> solution = nystrom(lambda V: (V @ a)[:, None] * a, a, damping=1.0, rank=2)
        >>> round(float(solution.x[1]), 4)  # a / (|a|^2 + 1)
        0.1538
    """
    system = System("nystrom", operator, b, damping, tol, max_iter)
    check_count("nystrom", "rank", rank)
    if system.damping == 0:
        raise ValueError("nystrom: damping is 0, expected > 0: outside of the subspace the inverse is 1 / damping")
    rank = min(rank, max_iter, b.shape[-1])
    sketch = nystrom_sketch(system.matmat, system.rows[:1], rank, seed)
    x = sketch.apply(system.rows, 1 / (sketch.values + system.damping), 1 / system.damping)
    details = {
        "rank": len(sketch.values),
        "eigenvalues": sketch.values.cpu(),
        "indefinite": sketch.is_indefinite,
    }
    return system.checked_solution(x, rank, "rank", details)


def nystrom_preconditioner(
    operator: Any, rank: int, damping: float, *, seed: int = 0, like: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """A preconditioner for `cg` that takes the largest eigenvalues of C away.

    Args:
        operator: C, positive semi-definite: an object with `.matmat`, or a function [K, P] -> [K, P].
        rank: random vectors that C is multiplied with, once.
        damping: that of the solve, > 0.
        seed: of the random vectors.
        like: a vector [P] of the dtype and device of right-hand sides, for operators that do not say them.

    Returns:
        M^-1 as a function [K, P] -> [K, P]; symmetric and positive definite.

    Raises:
        TypeError, ValueError: a number is no number or out of its range; `like` is missing.

    Memory: rank P numbers; 4 times as many while it is made.

    Source: Frangella, Tropp and Udell 2021 (arXiv 2110.02820), equation 1.3.
    """
    check_limits("nystrom_preconditioner", damping, None, 1)
    check_count("nystrom_preconditioner", "rank", rank)
    if damping == 0:
        raise ValueError("nystrom_preconditioner: damping is 0, expected > 0")
    if like is None:
        if not all(hasattr(operator, name) for name in ("size", "dtype", "device")):
            raise ValueError("nystrom_preconditioner: like is None, expected a vector [P] for an operator without size")
        like = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
    rank = min(rank, len(like))
    sketch = nystrom_sketch(products_of("nystrom_preconditioner", operator), like[None], rank, seed)
    values = sketch.values
    least = float(values[-1]) if len(values) == rank else 0.0
    return lambda rows: sketch.apply(rows, (least + damping) / (values + damping), 1.0)


def nystrom_sketch(products: Products, like: Tensor, rank: int, seed: int) -> Sketch:
    """The approximation Y^T (Omega Y^T)^-1 Y, Y = C Omega, for random orthonormal Omega [rank, P].

    A small multiple of the identity is added before the core is factorised and taken away afterwards, without which
    the factorisation fails in rounding (Tropp et al. 2017, algorithm 3).
    """
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(like.shape[1], rank, generator=generator).to(like)
    omega = torch.linalg.qr(omega).Q.T.contiguous()
    y = torch.cat([products(block).detach().to(like.dtype) for block in omega.split(BLOCK)])
    shift = torch.finfo(like.dtype).eps * float(y.norm())
    core = (omega @ y.T).double()
    core = (core + core.T) / 2
    lowest, size = float(torch.linalg.eigvalsh(core)[0]), float(core.norm())
    is_indefinite = lowest < -100 * torch.finfo(like.dtype).eps * size
    y = y.add_(omega, alpha=shift)
    core.diagonal().add_(shift)
    half = _half_inverse(core, torch.finfo(like.dtype).eps)
    orthonormal, triangle = torch.linalg.qr((half.to(like) @ y).T)  # C ~ triangle and its transpose, in a basis
    left, singular, _ = torch.linalg.svd(triangle.double(), full_matrices=False)
    values = (singular.square() - shift).clamp(min=0)
    is_known = values > 0
    return Sketch((orthonormal @ left.to(like)).T[is_known], values[is_known], is_indefinite)


def _half_inverse(core: Tensor, epsilon: float) -> Tensor:
    """W with W core W^T = 1, on the part of the core that is not rounding."""
    factor, failed = torch.linalg.cholesky_ex(core)
    if not int(failed):
        return torch.linalg.solve_triangular(factor, torch.eye(len(core)).to(core), upper=False)
    values, vectors = torch.linalg.eigh(core)
    is_known = values > epsilon * values.abs().max()
    return vectors[:, is_known].T / values[is_known].sqrt()[:, None]
