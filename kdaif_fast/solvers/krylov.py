"""Low-rank inverses from Krylov spaces: what lanczos and arnoldi share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .looks import looks_every
from .solution import Solution
from .system import System, check_choice, check_count

STARTS = ("b", "random")
OUTSIDES = ("zero", "damping")


def low_rank_solution(
    system: System,
    max_iter: int,
    *,
    rank: int,
    steps: int | None,
    start: str,
    outside: str | None,
    seed: int,
    tridiagonal: bool,
) -> Solution:
    """(C + damping I)^-1 b on the span of the Ritz vectors with the largest |eigenvalues|, something simple outside."""
    check_count(system.name, "rank", rank)
    check_choice(system.name, "start", start, STARTS)
    if outside is None:
        outside = "damping" if system.damping else "zero"
    check_choice(system.name, "outside", outside, OUTSIDES)
    if outside == "damping" and system.damping == 0:
        raise ValueError(f"{system.name}: outside is 'damping', which takes damping > 0; 'zero' leaves it out")
    if steps is None:
        steps = rank if start == "b" else 2 * rank
    check_count(system.name, "steps", steps)
    steps = min(steps, max_iter, system.rows.shape[1])
    starts = system.rows if start == "b" else _random_start(system.rows, seed)
    basis, hessenberg = krylov_basis(system, starts, steps)
    asymmetry = (hessenberg - hessenberg.mT).norm() / hessenberg.norm().clamp(min=1e-300)
    if tridiagonal:
        hessenberg = hessenberg.tril(1).triu(-1)
    values, vectors = torch.linalg.eigh((hessenberg + hessenberg.mT) / 2)
    is_kept = torch.zeros_like(values).scatter_(1, values.abs().topk(min(rank, values.shape[1])).indices, 1).bool()
    x, is_singular = _apply_inverse(system, basis, values, vectors, is_kept, outside)
    details: dict[str, Any] = {
        "rank": int(is_kept.sum(1).max()),
        "eigenvalues": values.flip(1).cpu() if start == "b" and not system.is_one else values[0].flip(0).cpu(),
        "asymmetry": float(asymmetry),
        "outside": outside,
    }
    others = ["singular" if singular else "rank" for singular in is_singular.expand(len(x)).tolist()]
    return system.checked_solution(x, basis.shape[1], others, details)


def _random_start(rows: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, rows.shape[1], generator=generator).to(rows)


def krylov_basis(system: System, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases [S, m, P] of the Krylov spaces of C from S starts, and C in them [S, m, m], float64.

    Every vector is orthogonalised twice against all before it (twice is enough: Giraud et al. 2005). Where a space ends
    early, its further vectors are 0; m < steps if all do.
    """
    epsilon, look = torch.finfo(starts.dtype).eps, looks_every(starts.device)
    S, P = starts.shape
    basis = starts.new_zeros(S, steps, P)
    hessenberg = torch.zeros(S, steps + 1, steps, dtype=torch.float64, device=starts.device)
    basis[:, 0] = starts / _lengths(starts).clamp(min=torch.finfo(starts.dtype).tiny)[:, None].to(starts.dtype)
    largest = torch.zeros(S, dtype=torch.float64, device=starts.device)
    used = steps
    for j in range(steps):
        vector = system.matmat(basis[:, j].contiguous())
        largest = torch.maximum(largest, _lengths(vector))
        known = basis[:, : j + 1]
        for _ in range(2):
            parts = torch.bmm(known, vector[:, :, None])
            vector = torch.baddbmm(vector[:, :, None], known.mT, parts, alpha=-1)[:, :, 0]
            hessenberg[:, : j + 1, j] += parts[:, :, 0]
        lengths = _lengths(vector)
        goes_on = lengths > 10 * epsilon * largest
        hessenberg[:, j + 1, j] = torch.where(goes_on, lengths, 0)
        if j + 1 == steps:
            break
        factors = torch.where(goes_on, 1 / torch.where(goes_on, lengths, 1), 0)
        basis[:, j + 1] = vector * factors[:, None].to(vector.dtype)
        if (j + 1) % look == 0 and not bool(goes_on.any()):
            used = j + 1
            break
    return basis[:, :used], hessenberg[:, :used, :used]


def _lengths(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1, dtype=torch.float64)


def _apply_inverse(
    system: System, basis: Tensor, values: Tensor, vectors: Tensor, is_kept: Tensor, outside: str
) -> tuple[Tensor, Tensor]:
    """x [K, P], and where an eigenvalue had no inverse and was left out."""
    rows = system.rows
    is_shared = len(basis) == 1
    flat = rows @ basis[0].T if is_shared else torch.bmm(basis, rows[:, :, None])[:, :, 0]
    parts = torch.einsum("smr,sm->sr", vectors.expand(len(rows), -1, -1), flat.double())
    shifted = values + system.damping
    is_zero = shifted.abs() <= 10 * torch.finfo(rows.dtype).eps * shifted.abs().amax(1, keepdim=True)
    inverse = torch.where(is_zero, 0, 1 / torch.where(is_zero, 1, shifted))
    beyond = 1 / system.damping if outside == "damping" else 0.0
    coefficients = torch.where(is_kept, inverse - beyond, 0) * parts
    weights = torch.einsum("smr,sr->sm", vectors.expand(len(rows), -1, -1), coefficients).to(rows.dtype)
    x = weights @ basis[0] if is_shared else torch.bmm(weights[:, None], basis)[:, 0]
    met = (is_zero & is_kept & (parts.abs() > 1e-6 * rows.double().norm(dim=1, keepdim=True))).any(1)
    return (x + beyond * rows if beyond else x), met
