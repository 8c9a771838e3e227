"""(C + damping I) x = b as every solver sees it: right-hand sides in rows of ordinary size, and products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .solution import GOOD, Solution

Products = Callable[[Tensor], Tensor]


class System:
    """Right-hand sides [K, P], each divided by its largest entry so that squares neither under- nor overflow.

    Args:
        name: the solver's, for messages.
        operator: has `.matmat` or `.matvec`, or is a function [K, P] -> [K, P].
        b: [P] or [K, P], float32 or float64.
        damping, tol, max_iter: as of every solver.
    """

    def __init__(
        self, name: str, operator: Any, b: Tensor, damping: float, tol: float | None, max_iter: int = 1
    ) -> None:
        check_limits(name, damping, tol, max_iter)
        _check_right_hand_sides(name, operator, b)
        self.name, self.operator = name, operator
        self.damping, self.tol = float(damping), tol
        self.is_one = b.dim() == 1
        rows = (b[None] if self.is_one else b).detach().contiguous()  # kernels write to vectors laid out like these
        # A b of zeros keeps its unit, so that x is 0 and not 0 / 0.
        self.units = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(b.dtype).tiny)
        self.rows = rows / self.units
        squares = self.rows.double().square().sum(1).to(b.dtype)  # rounded as the solvers have them
        self.squares = squares.double().cpu()  # |b|^2 [K], in these units
        if not bool(self.squares.isfinite().all()):
            k = int((~self.squares.isfinite()).nonzero()[0])
            raise ValueError(f"{name}: b{'' if self.is_one else f'[{k}]'} has values that are not finite")
        self._matmat = products_of(name, operator)

    def matmat(self, vectors: Tensor) -> Tensor:
        """C times every row of [K, P], checked."""
        products = self._matmat(vectors)
        if not isinstance(products, Tensor) or products.shape != vectors.shape:
            got = tuple(products.shape) if isinstance(products, Tensor) else type(products).__name__
            raise ValueError(
                f"{self.name}: the operator made {got} of vectors {tuple(vectors.shape)}, expected the same shape: it "
                "must multiply every row of [K, P]"
            )
        if products.dtype != vectors.dtype or products.requires_grad:
            products = products.detach().to(vectors.dtype)
        return products

    def damped(self, vectors: Tensor) -> Tensor:
        """C + damping I times every row."""
        products = self.matmat(vectors)
        return products.add(vectors, alpha=self.damping) if self.damping else products

    def residuals(self, x: Tensor) -> Tensor:
        """The relative residuals, float64 [K] on the CPU, of solutions [K, P] in the system's units: one product."""
        errors = (self.rows - self.damped(x)).double().square().sum(1).cpu()
        return relative(errors, self.squares)

    def per_column(self, values: Tensor) -> Any:
        """[K] on the CPU, or the number itself if b is one vector."""
        return values.item() if self.is_one else values

    def solution(
        self, x: Tensor, residuals: Tensor, iterations: int, reasons: Sequence[str], details: dict[str, Any]
    ) -> Solution:
        """The solver's result; x [K, P] in the system's units."""
        x = x * self.units
        return Solution(
            x[0] if self.is_one else x,
            self.per_column(residuals),
            iterations,
            all(reason in GOOD for reason in reasons),
            self.damping,
            reasons[0] if self.is_one else tuple(reasons),
            details,
        )

    def checked_solution(
        self, x: Tensor, iterations: int, otherwise: str | Sequence[str], details: dict[str, Any]
    ) -> Solution:
        """The result with its true residual (one more product); `otherwise`: the reasons of columns above tol."""
        residuals = self.residuals(x)
        others = [otherwise] * len(x) if isinstance(otherwise, str) else otherwise
        reasons = [
            "tolerance" if self.tol is not None and residual <= self.tol else other
            for residual, other in zip(residuals.tolist(), others, strict=True)
        ]
        return self.solution(x, residuals, iterations, reasons, details)


def relative(errors: Tensor, squares: Tensor) -> Tensor:
    """sqrt(errors / squares), 0 where both are 0."""
    return torch.where(squares > 0, errors / squares.clamp(min=torch.finfo(torch.float64).tiny), errors).sqrt()


def products_of(name: str, operator: Any) -> Products:
    """The operator as a function [K, P] -> [K, P]."""
    if hasattr(operator, "matmat"):
        matmat: Products = operator.matmat
        return matmat
    if hasattr(operator, "matvec"):
        return lambda vectors: torch.stack([operator.matvec(vector) for vector in vectors])
    if callable(operator):
        function: Products = operator
        return function
    kind = type(operator).__name__
    raise TypeError(f"{name}: operator is a {kind}, expected an object with .matmat, or a function [K, P] -> [K, P]")


def _check_right_hand_sides(name: str, operator: Any, b: Any) -> None:
    if not isinstance(b, Tensor):
        raise TypeError(f"{name}: b is a {type(b).__name__}, expected a tensor [P] or [K, P]")
    if b.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: b has dtype {b.dtype}, expected float32 or float64")
    if b.dim() not in (1, 2) or b.numel() == 0:
        raise ValueError(f"{name}: b has shape {tuple(b.shape)}, expected [P] or [K, P], not empty")
    size = getattr(operator, "size", None)
    if isinstance(size, int) and b.shape[-1] != size:
        expected = f"({size},) or (K, {size})"
        raise ValueError(f"{name}: b has shape {tuple(b.shape)}, expected {expected}: one entry a parameter")


def check_limits(name: str, damping: float, tol: float | None, max_iter: int) -> None:
    """Raise unless these are what they should be; `name` is the caller's."""
    if isinstance(damping, bool) or not isinstance(damping, Real):
        raise TypeError(f"{name}: damping is {damping!r}, expected a number >= 0")
    if not 0 <= damping < math.inf:
        raise ValueError(f"{name}: damping is {damping!r}, expected a finite number >= 0")
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, Real)):
        raise TypeError(f"{name}: tol is {tol!r}, expected a number between 0 and 1, or None")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"{name}: tol is {tol!r}, expected a number between 0 and 1, or None")
    check_count(name, "max_iter", max_iter)


def check_count(name: str, argument: str, value: Any) -> None:
    """Raise unless an argument is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: {argument} is {value!r}, expected an int >= 1")
    if value < 1:
        raise ValueError(f"{name}: {argument} is {value!r}, expected at least 1")


def check_choice(name: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless an argument is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: {argument} is {value!r}, expected one of {', '.join(map(repr, choices))}")
