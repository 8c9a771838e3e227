"""Which preconditioner the conjugate gradients of a solve get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..curvature import CurvatureOperator, GaussNewton, MonteCarloFisher, StreamedCurvature

NAMES = ("auto", "kfac", "ekfac", "none")

MEMORY = 1 << 30
"""Bytes that the factors of an automatic preconditioner may take, unless `memory` says else."""

# Multiplications of an eigendecomposition of an n x n matrix, over n^3; and products of vectors that a good
# preconditioner saves, at the least.
EIGENDECOMPOSITION, SAVED = 10, 20


def check_preconditioner(options: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a name that is none."""
    chosen = (options or {}).get("preconditioner")
    if isinstance(chosen, str) and chosen not in NAMES:
        raise ValueError(
            f"solver_options['preconditioner'] is {chosen!r}, expected one of {', '.join(map(repr, NAMES))}, a "
            "function or an object with .solve"
        )


def choose_preconditioner(chosen: Any, operator: CurvatureOperator, is_rough: bool, memory: int | None) -> Any:
    """The preconditioner itself: what was given, the one of that name, or None.

    "auto" is K-FAC for rough solves with Gauss-Newton or Fisher matrices, if its factors are small enough. On digits
    (networks of benchmarks/rank_tolerance.py after 10 epochs, damping "auto") a residual of 3e-2 takes 39 products with
    it and 121 without (perceptron), 30 and 45 (convolutions); but one of 1e-4 takes 530 and 356, 336 and 126. A ranking
    settles sooner with it too, but less reliably, so that tol="rank" has to be stricter and gains nothing in the end.

    Args:
        chosen: None or a name of `NAMES`, or a preconditioner.
        operator: the curvature.
        is_rough: whether the solve ends far from the solution.
        memory: bytes that factors may take; None for 1 GiB.
    """
    if chosen is not None and not isinstance(chosen, str):
        return chosen
    if chosen == "none" or not isinstance(operator, StreamedCurvature):
        return None
    if chosen == "ekfac":
        return operator.ekfac()
    if chosen == "kfac":
        return operator.kfac()
    if not (is_rough and isinstance(operator, (GaussNewton, MonteCarloFisher)) and _is_worth_it(operator, memory)):
        return None
    found = operator.kfac()
    try:
        found.mean_eigenvalue()  # the statistics are made when they are first asked for
    except ValueError:  # a loss whose curvature at the outputs is not to be had so
        return None
    return found


def _is_worth_it(operator: StreamedCurvature, memory: int | None) -> bool:
    """Whether factors of all layers would fit, and finding their eigenvectors costs less than the products saved."""
    matrices = [(len(p), p[0].numel()) for p in operator.parameters.values() if p.dim() >= 2 and p.numel()]
    factors = sum(m**2 + n**2 for m, n in matrices)
    if 3 * factors * operator.dtype.itemsize > (memory or MEMORY):
        return False
    decompositions = EIGENDECOMPOSITION * sum(m**3 + n**3 for m, n in matrices)
    return decompositions < SAVED * 4 * operator.samples * operator.size
