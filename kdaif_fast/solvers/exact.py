"""The dense matrix, and its Cholesky factor or its eigenvectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .solution import Solution
from .system import System, check_count

MAX_SIZE = 20_000
BLOCK = 64  # unit vectors that are multiplied at once


def exact(
    operator: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float | None = 1e-3,
    max_iter: int = 500,
    max_size: int = MAX_SIZE,
) -> Solution:
    """Solve (C + damping I) x = b with the matrix itself, in float64.

    By Cholesky's factors, or by eigenvectors where the matrix is not positive definite; there, eigenvalues that are 0
    to rounding are left out, as in a pseudo-inverse.

    Args:
        operator: C: an object with `.dense()` or `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides [P] or [K, P], float32 or float64.
        damping: what is added to every eigenvalue of C, >= 0.
        tol: the relative residual that counts as converged.
        max_iter: not used: all P products are needed.
        max_size: the largest P that a matrix is formed for.

    Returns:
        The solution with its true residual, which takes one more product. Reasons above tol: "singular" if eigenvalues
        were left out, else "rounding". details: "factorisation" ("cholesky" or "eigenvalues"), "asymmetry" (of the
        products, relative), and with eigenvalues "eigenvalues" of C + damping I, rising, and "left_out", how many.

    Raises:
        ValueError: P is above max_size; says how much memory it would take.
        TypeError, ValueError: b is no vectors, or a number is no number or out of its range.

    Memory: 24 P^2 bytes: the matrix as it comes, in float64 and factorised.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, -4.0]])
        >>> solution = exact(lambda V: V @ C, torch.tensor([2.0, 4.0]))
        >>> solution.x.tolist(), solution.details["factorisation"]
        ([1.0, -1.0], 'eigenvalues')
    """
    system = System("exact", operator, b, damping, tol, max_iter)
    check_count("exact", "max_size", max_size)
    size = system.rows.shape[1]
    if size > max_size:
        raise ValueError(
            f"exact: P is {size:,} parameters, whose matrix and factors would take {24 * size**2 / 1e9:,.1f} GB; "
            f"expected at most max_size={max_size:,}. Use method='cg', or raise max_size"
        )
    matrix = _dense(system).double()
    asymmetry = float((matrix - matrix.T).norm() / matrix.norm().clamp(min=1e-300))
    matrix = (matrix + matrix.T) / 2
    matrix.diagonal().add_(system.damping)
    columns = system.rows.double().T
    factor, failed = torch.linalg.cholesky_ex(matrix)
    details: dict[str, Any] = {"factorisation": "cholesky", "asymmetry": asymmetry}
    left_out = 0
    if not int(failed) and _is_regular(factor, system.rows.dtype):
        x = torch.cholesky_solve(columns, factor).T
    else:
        del factor
        values, vectors = torch.linalg.eigh(matrix)
        is_zero = values.abs() <= _rounding(system.rows.dtype) * values.abs().max()
        inverse = torch.where(is_zero, 0, 1 / torch.where(is_zero, 1, values))
        x = (vectors @ (inverse[:, None] * (vectors.T @ columns))).T
        left_out = int(is_zero.sum())
        details |= {"factorisation": "eigenvalues", "eigenvalues": values.cpu(), "left_out": left_out}
    x = x.to(system.rows.dtype).contiguous()
    return system.checked_solution(x, size, "singular" if left_out else "rounding", details)


def _dense(system: System) -> Tensor:
    P = system.rows.shape[1]
    if hasattr(system.operator, "dense"):
        matrix = system.operator.dense()
        if not isinstance(matrix, Tensor) or matrix.shape != (P, P):
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"exact: the operator's .dense() is {got}, expected ({P}, {P}) as b")
        return matrix.detach()
    units = torch.eye(P, dtype=system.rows.dtype, device=system.rows.device)
    return torch.cat([system.matmat(block) for block in units.split(BLOCK)])


def _is_regular(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether no pivot is rounding: Cholesky's algorithm goes through on matrices that are singular but for that."""
    pivots = factor.diagonal().square()
    return bool(pivots.min() > _rounding(dtype) * pivots.max())


def _rounding(dtype: torch.dtype) -> float:
    """What the products' rounding makes of an eigenvalue of 0, relative to the largest one."""
    return 10 * torch.finfo(dtype).eps
