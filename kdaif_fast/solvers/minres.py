"""Minimal residuals, for indefinite matrices and K right-hand sides at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .looks import FEW_LEFT, looks_every
from .solution import Solution
from .system import System

# The recurrence knows its residual to rounding only, and the residual that is checked is the true one.
MARGIN = 0.7

# Where C has no inverse, the recurrence comes near the least-squares solution, where |A r| / (|A| |r|) is small, and
# then leaves it again, while it believes that r falls: the ratio has grown by this though r has not halved.
LEFT_AGAIN = 100


def minres(
    operator: Any, b: Tensor, *, damping: float = 0.0, tol: float | None = 1e-3, max_iter: int = 500
) -> Solution:
    """Solve (C + damping I) x = b for any symmetric C: the x of least residual in a growing Krylov space.

    Every right-hand side takes its own steps; one product an iteration serves those that are not done.

    Args:
        operator: C: an object with `.matmat`, or a function [K, P] -> [K, P].
        b: right-hand sides [P] or [K, P], float32 or float64.
        damping: what is added to every eigenvalue of C, >= 0.
        tol: a right-hand side is done when its residual is below tol * |b|; None runs all of max_iter (no look at the
            values, no wait).
        max_iter: the most products to spend.

    Returns:
        The solution with its true residual, which takes one more product. Reasons beside "tolerance" and "max_iter":
        "singular", C + damping I has no inverse and x is a least-squares solution; "rounding", the recurrence believes
        in a residual that is not there: the matrix is too badly conditioned for the dtype. details: "iterations" of
        each right-hand side.

    Raises:
        TypeError, ValueError: b is no vectors, or a number is no number or out of its range.

    Memory: 8 tensors like b, and what the operator needs.

    Source: Paige and Saunders 1975, "Solution of sparse indefinite systems of linear equations", section 6.

    Example:
        >>> import torch
        >>> C = torch.tensor([[2.0, 0.0], [0.0, -4.0]])
        >>> [round(value, 4) for value in minres(lambda V: V @ C, torch.tensor([2.0, 4.0]), tol=1e-6).x.tolist()]
        [1.0, -1.0]
    """
    system = System("minres", operator, b, damping, tol, max_iter)
    state = _start(system)
    done: list[dict[str, Tensor]] = []
    look = looks_every(b.device)
    iterations = 0
    products = max_iter if tol is None or bool(system.squares.any()) else 0
    while iterations < products:
        _iterate(system, state)
        iterations += 1
        if tol is None or iterations % look:
            continue
        running = sum(state["running"].tolist())
        if running == 0:
            break
        if running <= FEW_LEFT * len(state["running"]):
            done.append(_at(state, ~state["running"]))
            state = _at(state, state["running"])
    parts = [*done, state]
    order = torch.cat([part["ids"] for part in parts]).argsort()
    state = {name: torch.cat([part[name] for part in parts])[order] for name in ("x", "running", "singular", "count")}
    others = [
        "max_iter" if tol is None or is_running else "singular" if is_singular else "rounding"
        for is_running, is_singular in zip(state["running"].tolist(), state["singular"].tolist(), strict=True)
    ]
    details = {"iterations": system.per_column(state["count"].cpu())}
    return system.checked_solution(state["x"], iterations, others, details)


def _start(system: System) -> dict[str, Tensor]:
    rows = system.rows
    beta = rows.double().norm(dim=1)
    zero = torch.zeros_like(beta)
    is_wanted = beta > 0
    return {
        "ids": torch.arange(len(rows), device=rows.device),
        "x": torch.zeros_like(rows),
        "v": rows / torch.where(is_wanted, beta, 1)[:, None].to(rows.dtype),
        "v_old": torch.zeros_like(rows),
        "w": torch.zeros_like(rows),
        "w_old": torch.zeros_like(rows),
        "beta": zero,  # between v_old and v
        "cos": zero - 1,
        "sin": zero,
        "delta_bar": zero,
        "epsilon": zero,
        "phi_bar": beta,  # |r|
        "goal": beta * (0.0 if system.tol is None else MARGIN * system.tol),
        "nearest": torch.zeros_like(rows),  # the iterate of least |A r| / (|A| |r|)
        "least_ratio": zero + math.inf,
        "phi_bar_then": beta,
        "size": zero,  # squares of the tridiagonal matrix's entries
        "running": is_wanted,
        "singular": torch.zeros_like(is_wanted),
        "count": torch.zeros_like(beta, dtype=torch.int64),
    }


def _iterate(system: System, s: dict[str, Tensor]) -> None:
    """One step of Lanczos, one Givens rotation; letters as in Paige and Saunders, bars as there."""
    dtype, rounding = system.rows.dtype, torch.finfo(system.rows.dtype).eps
    running = s["running"]

    def times(scalars: Tensor, vectors: Tensor) -> Tensor:
        return scalars.to(dtype)[:, None] * vectors

    product = system.damped(s["v"])
    alpha = (s["v"] * product).sum(1, dtype=torch.float64)
    product = product - times(alpha, s["v"]) - times(s["beta"], s["v_old"])
    beta = product.norm(dim=1, dtype=torch.float64)
    size = s["size"] + alpha**2 + s["beta"] ** 2 + beta**2
    delta = s["cos"] * s["delta_bar"] + s["sin"] * alpha
    gamma_bar = s["sin"] * s["delta_bar"] - s["cos"] * alpha
    delta_bar = -s["cos"] * beta
    ratio = torch.hypot(gamma_bar, delta_bar) / size.sqrt().clamp(
        min=torch.finfo(torch.float64).tiny
    )  # before the step
    is_nearer = running & (ratio < s["least_ratio"])
    s["nearest"] = torch.where(is_nearer[:, None], s["x"], s["nearest"])
    s["least_ratio"] = torch.where(is_nearer, ratio, s["least_ratio"])
    s["phi_bar_then"] = torch.where(is_nearer, s["phi_bar"], s["phi_bar_then"])
    has_left = (s["least_ratio"] <= rounding**0.5) & (ratio > LEFT_AGAIN * s["least_ratio"])
    is_singular = running & ((ratio <= 10 * rounding) | (has_left & (s["phi_bar"] > s["phi_bar_then"] / 2)))
    running = running & ~is_singular
    gamma = torch.hypot(gamma_bar, beta)
    gamma = torch.where(gamma > 0, gamma, 1)
    cos, sin = gamma_bar / gamma, beta / gamma
    w = times(1 / gamma, s["v"] - times(s["epsilon"], s["w_old"]) - times(delta, s["w"]))
    phi = torch.where(running, cos * s["phi_bar"], 0)
    s["x"].add_(torch.where(running[:, None], times(phi, w), 0))
    is_whole = beta <= rounding * size.sqrt()  # the Krylov space holds the solution, if there is one
    phi_bar = torch.where(running, torch.where(is_whole, 0, sin * s["phi_bar"]), s["phi_bar"])
    s["count"] = s["count"] + s["running"]
    s["x"] = torch.where(is_singular[:, None], s["nearest"], s["x"])
    s["singular"] = s["singular"] | is_singular
    s["running"] = running & ~is_whole & (phi_bar > s["goal"])
    s["epsilon"] = s["sin"] * beta
    s["v_old"], s["v"] = s["v"], times(torch.where(is_whole, 0, 1 / torch.where(is_whole, 1, beta)), product)
    s["w_old"], s["w"] = s["w"], w
    s["beta"], s["cos"], s["sin"] = beta, cos, sin
    s["delta_bar"], s["phi_bar"], s["size"] = delta_bar, phi_bar, size


def _at(state: dict[str, Tensor], which: Tensor) -> dict[str, Tensor]:
    return {name: values[which] for name, values in state.items()}
