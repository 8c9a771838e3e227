"""What influence_scores keeps of a run beside its scores, and takes over from a run before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._data import Batches
from .._distributed import Group, agree, gather_over_ranks, rank_in, together
from .._model import plain_model
from ..curvature import CurvatureOperator
from ..solvers import ConvergenceError, Solution
from .fingerprint import describe, of_data, of_model, structure
from .result_file import ResultFile


def require_alike(settings: Mapping[str, Any], model: nn.Module, parameters: list[str], group: Group) -> None:
    """Raise ValueError, on all ranks, unless they have been called with the same settings and the same model.

    Else they would add up what does not belong together, or wait for each other.
    """
    if group is None:
        return
    own = {name: describe(value) for name, value in settings.items()}
    own |= {"parameters that influence is over": parameters, "values of the model": of_model(plain_model(model))}
    first, *others = gather_over_ranks(own, group)
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{name}: {value!r} on the first rank of the group, but {theirs[name]!r} on that of number {rank}; "
                    "all need the same"
                )


def open_result(
    out: str | os.PathLike[str],
    resume: bool,
    settings: Mapping[str, Any],
    model: nn.Module,
    operator: CurvatureOperator,
    data: tuple[Batches, ...],
    group: Group,
) -> ResultFile:
    """The file that scores go to, with all that they depend on as its settings.

    Raises ValueError or OSError: see ResultFile; and with a group, an `out` that is the same for every rank.
    """
    path = os.fspath(out)
    if group is not None:
        if "{rank}" not in path:
            raise ValueError(
                f"out is {path!r}, which every rank would write to: with a group it must contain '{{rank}}'"
            )
        path = path.replace("{rank}", str(rank_in(group)))
    everything = {name: describe(value) for name, value in settings.items()}
    everything["parameters that influence is over"] = list(operator.parameters)
    everything["values of the model"] = of_model(plain_model(model))
    everything["layers of the model"] = structure(plain_model(model))
    everything["ranks"] = [rank_in(group), len(gather_over_ranks(None, group))]
    with together(group, operator.device):
        for batches in data:
            everything[batches.name] = of_data(batches)
        return ResultFile(path, everything, resume)


def save_solution(file: ResultFile, solution: Solution, labels: list[int]) -> None:
    """Keep a solve that is finished; labels: what the queries are of."""
    residual = solution.residual
    report = {
        "damping": float(solution.damping),
        "residual": residual.tolist() if isinstance(residual, torch.Tensor) else float(residual),
        "iterations": int(solution.iterations),
        "converged": bool(solution.converged),
        "reason": solution.reason if isinstance(solution.reason, str) else list(solution.reason),
    }
    file.save_solution(solution.x, {**report, "queries": labels})


def load_solution(
    file: ResultFile, operator: CurvatureOperator, group: Group, *, must_converge: bool
) -> Solution | None:
    """The solution of a run before, if there is one on every rank; else nothing of what was done counts.

    Raises ConvergenceError: it must have converged, and has not.
    """
    with together(group, operator.device):
        saved = file.solution()
    if not agree(saved is not None, group, operator.device):
        if saved is not None:
            file.start_over()
        return None
    assert saved is not None
    x, report = saved
    with together(group, operator.device):
        residual, reason = report["residual"], report["reason"]
        if must_converge and not report["converged"]:
            raise ConvergenceError(
                f"{file.path} was begun with a solution that had not converged (relative residual {residual}, reason "
                f"{reason!r}): resume=False solves again"
            )
    return Solution(
        x=x.to(operator.device),
        residual=torch.tensor(residual, dtype=torch.float64) if isinstance(residual, list) else residual,
        iterations=report["iterations"],
        converged=report["converged"],
        damping=report["damping"],
        reason=reason if isinstance(reason, str) else tuple(reason),
    )
