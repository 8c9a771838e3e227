"""The state of conjugate gradients: vectors [K, P] and scalars [K], a row for every right-hand side."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Residuals of conjugate gradients go up and down, but not by this much unless rounding has taken over.
DIVERGED = 1e4


@dataclasses.dataclass
class Columns:
    """K right-hand sides ("columns"), each with its own scalars; one that is not running takes steps of 0.

    Scalars are NumPy arrays on the CPU, where a dozen operations on [K] must cost less than one pass over a small
    model's vectors, and tensors elsewhere; both understand the same formulas.
    """

    xp: Any  # numpy or torch
    ids: Tensor  # places among the right-hand sides
    x: Tensor
    r: Tensor
    p: Tensor
    best: Tensor  # the iterate of least residual, unless `better` says that it is x
    rr: Any  # r . r
    rz: Any  # r . M^-1 r
    goal: Any  # below this r . r, the column is done
    most: Any  # above this r . M^-1 r, it has diverged
    best_rr: Any  # the least r . r so far
    first_rr: Any  # what the first direction itself would leave of the residual
    lowest: Any  # of p . A p / p . p, as far as `settled`
    highest: Any
    last: Any  # that of the last direction
    iterations: Any
    running: Any
    better: Any
    indefinite: Any  # whether r . M^-1 r was not positive
    unsettled: list[tuple[Any, Any, Any]] = dataclasses.field(default_factory=list)  # p . A p, p . p, running

    @classmethod
    def start(cls, rows: Tensor, precondition: Callable[[Tensor], Tensor] | None, tol: float | None) -> Columns:
        """x = 0, r = b, p = M^-1 b."""
        xp = scalars_for(rows.device)
        as_scalar: Callable[[Tensor], Any] = Tensor.numpy if xp is not torch else Tensor.detach
        r = rows.clone()
        p = r.clone() if precondition is None else precondition(r).clone()
        squares = _sums(r, r)
        rr = as_scalar(squares)
        rz = rr if precondition is None else as_scalar(_sums(r, p))
        # Below rounding, r says nothing, and directions say nothing of the matrix.
        goal = rr * max(0.0 if tol is None else tol**2, torch.finfo(rows.dtype).eps ** 2)
        is_wanted, none = rr > goal, as_scalar(torch.zeros_like(squares))
        return cls(
            xp=xp,
            ids=torch.arange(len(rows), device=rows.device),
            x=torch.zeros_like(rows),
            r=r,
            p=p,
            best=torch.zeros_like(rows),
            rr=rr,
            rz=rz,
            goal=goal,
            most=rz * DIVERGED**2,
            best_rr=rr,
            first_rr=none,
            lowest=none + math.inf,
            highest=none - math.inf,
            last=none + math.inf,
            iterations=as_scalar(torch.zeros_like(squares, dtype=torch.int64)),
            running=is_wanted & (rz > 0),
            better=none < 0,
            indefinite=is_wanted & ~(rz > 0),
        )

    def steps(self, dots: Tensor, damping: float) -> Tensor:
        """The step of every column, from p . C p and p . p."""
        pAp, pp = self._as_scalar(dots)
        if damping:
            with _silent(self.xp):
                pAp = pAp + damping * pp
        self.unsettled.append((pAp, pp, self.running))
        # From here on the steps of a column that stops are 0, so no look at the values is needed for stopping.
        self.running = self.running & (pAp > 0)
        return self._ratios(self.rz, pAp)

    def conjugate(self, rr: Tensor, rz: Tensor | None = None) -> Tensor:
        """What the next directions have of the last ones, [K, 1], from r . r and, if they differ, r . M^-1 r."""
        previous = self.rz
        self.rr = self._as_scalar(rr)
        self.rz = self.rr if rz is None else self._as_scalar(rz)
        self.better = self.rr < self.best_rr
        self.best_rr = self.xp.fmin(self.rr, self.best_rr)
        self.running = self.running & (self.rr > self.goal) & (self.rz <= self.most)
        if rz is not None:
            is_positive = self.rz > 0
            self.indefinite = self.indefinite | (self.running & ~is_positive)
            self.running = self.running & is_positive
        return self._ratios(self.rz, previous).unsqueeze(1)

    def _ratios(self, a: Any, b: Any) -> Tensor:
        """a / b of the columns that are running, and 0."""
        if self.xp is torch:
            return torch.where(self.running, a / b, 0)
        ratios = self.xp.zeros_like(a)
        self.xp.divide(a, b, out=ratios, where=self.running)
        return torch.from_numpy(ratios)

    def settle(self) -> None:
        """Bring what is only wanted in the end up to date: extreme quotients, the last ones, counts."""
        if not self.unsettled:
            return
        xp = self.xp
        pAp, pp, running = (xp.stack(rows) for rows in zip(*self.unsettled, strict=True))
        self.unsettled.clear()
        with _silent(xp):
            quotients = pAp / pp
        spent = running.sum(0)
        at = xp.where(spent > 0, spent - 1, 0)[None]  # a column that stops does not start again
        last = (xp.take_along_axis(quotients, at, 0) if xp is not torch else quotients.gather(0, at))[0]
        self.last = xp.where(spent > 0, last, self.last)
        is_known = running & (quotients == quotients)
        self.lowest = xp.fmin(self.lowest, _amin(xp.where(is_known, quotients, math.inf)))
        self.highest = xp.fmax(self.highest, -_amin(xp.where(is_known, -quotients, math.inf)))
        self.iterations = self.iterations + spent

    def rate_first_direction(self, Ap: Tensor, damping: float) -> None:
        """Note how good the first direction itself would be, which is what is left if no step can be taken along it.

        The direction need not be kept: a column that takes no step keeps its r, and with it p.
        """
        rest = self.r - Ap
        if damping:
            rest.sub_(self.p, alpha=damping)
        self.first_rr = self._as_scalar(_sums(rest, rest))

    def restart(self, which: Tensor, r: Tensor, precondition: Callable[[Tensor], Tensor] | None) -> None:
        """Let some columns, given by their positions, go on with other residuals, without what they know so far."""
        self.settle()
        z = r if precondition is None else precondition(r)
        self.r[which], self.p[which] = r, z
        self.rr, self.rz = self._with(self.rr, which, _sums(r, r)), self._with(self.rz, which, _sums(r, z))
        self.best_rr = self._with(self.best_rr, which, _sums(r, r))
        self.better = self._with(self.better, which, torch.ones_like(which, dtype=torch.bool))
        self.running = self._with(self.running, which, _sums(r, z) > 0)

    def _with(self, values: Any, which: Tensor, given: Tensor) -> Any:
        tensor = self._as_tensor(values).clone()
        tensor[which] = given
        return self._as_scalar(tensor)

    def keep(self) -> Tensor:
        """Where x is the best iterate so far, bool [K]."""
        return self._as_tensor(self.better)

    def running_count(self) -> int:
        """How many columns are not done: a look at the values."""
        return sum(self.running.tolist())

    def is_running(self) -> Tensor:
        """Which columns are not done, bool [K]."""
        return self._as_tensor(self.running)

    def at(self, which: Tensor) -> Columns:
        """Some of the columns; `which` is bool [K]."""
        self.settle()
        chosen = self._as_scalar(which)
        values = {name: getattr(self, name) for name in ARRAYS}
        part = {name: value[which if isinstance(value, Tensor) else chosen] for name, value in values.items()}
        return dataclasses.replace(self, **part, unsettled=[])

    def joined(self, others: Sequence[Columns]) -> Columns:
        """These columns and others, in the order of the right-hand sides."""
        if not others:
            return self
        self.settle()
        parts = [self, *others]
        order = torch.cat([part.ids for part in parts]).argsort()
        joined = {}
        for name in ARRAYS:
            values = [getattr(part, name) for part in parts]
            is_tensor = isinstance(values[0], Tensor)
            joined[name] = torch.cat(values)[order] if is_tensor else self.xp.concatenate(values)[order.numpy()]
        return dataclasses.replace(self, **joined, unsettled=[])

    def numbers(self, name: str) -> list[Any]:
        """One of the scalars, as Python's numbers."""
        self.settle()
        values: list[Any] = getattr(self, name).tolist()
        return values

    def _as_scalar(self, values: Tensor) -> Any:
        return values.numpy() if self.xp is not torch else values

    def _as_tensor(self, values: Any) -> Tensor:
        tensor: Tensor = torch.from_numpy(values) if self.xp is not torch else values
        return tensor


def scalars_for(device: torch.device) -> Any:
    """Who calculates with scalars: numpy, or torch on other devices and where there is no numpy."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("numpy") if device.type == "cpu" else torch
    return torch


ARRAYS = tuple(field.name for field in dataclasses.fields(Columns) if field.name not in ("xp", "unsettled"))


def _amin(values: Any) -> Any:
    return values.amin(0) if isinstance(values, Tensor) else values.min(0)


def _silent(xp: Any) -> Any:
    """Without numpy's warnings of what is infinite or no number, which torch does not give."""
    return contextlib.nullcontext() if xp is torch else xp.errstate(all="ignore")


def _sums(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1).to(a.dtype)
