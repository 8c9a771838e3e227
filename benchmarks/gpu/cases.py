"""What a case of the benchmarks is, and how one is measured: checked first, then timed way by way."""

from __future__ import annotations

import contextlib
import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdaif_fast import _cuda_order, _library

from .ceilings import tf32
from .timing import Call, Timer, kernels_of, peak_of

OURS = ("kdaif_fast", "cuda", "triton", "cpu")
"""Ways that are this library's: its public call, or a backend's kernel of one op."""
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-3}
"""Relative, in the 2-norm, against the way that counts as right; float32 may be multiplied in TF32 here."""
CACHES = 3  # that the sets of inputs fill together
MOST_SETS = 24
MUCH = 2**33  # bytes that may stay allocated between cases: models, and what they keep


class SkippedError(Exception):
    """A way that cannot be taken here; the message says why."""


@dataclass(frozen=True)
class Target:
    """What a case is meant to reach: at least a share of its ceiling, or at most so many times another way's time."""

    text: str
    share: float | None = None
    times: float | None = None
    against: str | None = None

    def is_met(self, row: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> bool | None:
        """None where it cannot be said: no ceiling, or the other way was not measured."""
        if self.share is not None:
            return None if row.get("share") is None else row["share"] >= self.share
        other = others.get(str(self.against), {}).get("seconds")
        return None if not other or self.times is None else min(row["seconds"]) <= self.times * min(other)


@dataclass(frozen=True)
class Case:
    """Ways to one result, on inputs of one shape and dtype.

    Args:
        name: what is computed.
        shape, dtype: as the tables say it.
        inputs: makes a fresh set of random inputs.
        ways: name -> function of a set of inputs that gives the call to time. It may raise SkippedError.
        bytes, operations: the floor: each input read and each output written once; multiplications and additions.
        rate: which ceiling the operations have: "bf16", "tf32" or "float32".
        targets: what the library's ways are meant to reach.
        right: the way whose result the others are compared with.
        op: of the library, whose kernels' order the case says something about; `size` is its size class.
        asks_ahead: see Timer.time.
        peak_stated: bytes that the library's docstring promises at most; memory is measured where it is given.
        tf32: whether products of float32 may be formed on the matrix units.
        tolerance: if not that of the dtype.
        most_sets: of inputs at most, where what is done with one overflows the cache by itself.
        notes: way -> what its row is to say.
    """

    name: str
    shape: str
    dtype: str
    inputs: Callable[[], Any]
    ways: Mapping[str, Callable[[Any], Call]]
    bytes: float = 0.0
    operations: float = 0.0
    rate: str | None = None
    targets: tuple[Target, ...] = ()
    right: str | None = None
    op: str | None = None
    size: str | None = None
    asks_ahead: bool = True
    peak_stated: float | None = None
    tf32: bool = False
    tolerance: float | None = None
    most_sets: int = MOST_SETS
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """One line."""
        return f"{self.name} {self.shape} {self.dtype}"


def backends_of(op: Any, device: str, arguments: Callable[[Any], Sequence[Any]]) -> dict[str, Callable[[Any], Call]]:
    """A way for each kernel that an op has for the device, called as the dispatcher would call it."""
    if device == "cuda":
        kernels = _library.kernels_on_cuda(op)
    else:
        kernels = {_library.kernel_for(op, "cpu"): op, "reference": _library._references[op]}

    def way(kernel: Callable[..., Any]) -> Callable[[Any], Call]:
        def prepare(inputs: Any) -> Call:
            args = arguments(inputs)
            return lambda: kernel(*args)

        return prepare

    return {name: way(kernel) for name, kernel in kernels.items()}


def size_class(op: Any, *args: Any) -> str:
    """Of the op's order table."""
    return _cuda_order.SIZES[op._opname].size_class(*args)


def unchecked(call: Call) -> Call:
    """The call without its result, which is not that of the case: it is timed, and compared with nothing."""

    def run() -> None:
        call()

    return run


def keeping(call: Call, kept: deque[Any]) -> Call:
    """The call, whose result stays until as many others are there: else each is written where the last one was."""

    def run() -> None:
        kept.append(call())

    return run


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def error_of(found: Any, expected: Any) -> float:
    """The largest relative error of the floating-point results, in the 2-norm; NaN counts as infinite."""
    worst = 0.0
    pairs = zip(tensors_in(found), tensors_in(expected), strict=False)
    for a, b in pairs:
        if not b.is_floating_point() or b.numel() == 0:
            continue
        # Norms of parts: a float64 copy of everything would not fit.
        difference = size = 0.0
        for x, y in zip(a.detach().flatten().split(2**26), b.detach().flatten().split(2**26), strict=True):
            difference += float((x.double() - y.double()).square().sum())
            size += float(y.double().square().sum())
        error = math.sqrt(difference / size) if size else math.sqrt(difference)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


class Bench:
    """Measures cases on one device.

    Args:
        device: "cuda" or "cpu".
        timer: its timer.
        ceilings: name -> bytes or operations a second, as measured in this run.
        cache: bytes of the device's last cache.
    """

    def __init__(self, device: str, timer: Timer, ceilings: Mapping[str, float], cache: float) -> None:
        self.device, self.timer, self.ceilings, self.cache = device, timer, ceilings, cache

    def floor(self, case: Case) -> float | None:
        """Seconds that the case takes at least, at the ceilings."""
        copy, rate = self.ceilings.get("copy"), self.ceilings.get(case.rate or "")
        parts = [case.bytes / copy] if copy else []
        if case.operations and rate:
            parts.append(case.operations / rate)
        return max(parts, default=0.0) or None

    def sets(self, case: Case) -> list[Any]:
        """Inputs enough to overflow the cache, two at least."""
        first = case.inputs()
        held = sum(x.numel() * x.element_size() for x in tensors_in(first)) or 1
        count = 2 if self.device == "cpu" else min(max(math.ceil(CACHES * self.cache / held), 2), case.most_sets)
        return [first, *(case.inputs() for _ in range(count - 1))]

    def results_kept(self, result: Any, sets: int) -> int:
        """As many results as overflow the cache, so that writing one is writing to memory; at most one a set."""
        size = sum(x.numel() * x.element_size() for x in tensors_in(result))
        return min(math.ceil(CACHES * self.cache / size), sets) if size else 0

    def run(self, case: Case) -> list[dict[str, Any]]:
        """A row for each way. One that fails says so in its row, and the others are measured."""
        with tf32(case.tf32):
            return self._run(case)

    def _run(self, case: Case) -> list[dict[str, Any]]:
        sets, rows = self.sets(case), []
        expected = None
        tolerance = case.tolerance or TOLERANCE.get(case.dtype.split(",")[0], 1e-2)
        order = sorted(case.ways, key=lambda way: way != case.right)
        for way in order:
            row: dict[str, Any] = {"case": case.name, "shape": case.shape, "dtype": case.dtype, "way": way}
            row |= {"op": case.op, "size": case.size}
            rows.append(row)
            try:
                calls = [case.ways[way](inputs) for inputs in sets]
                result = calls[0]()
                self.timer.wait()
                if way == case.right:
                    expected = result
                elif expected is not None and result is not None:
                    row["error"] = error_of(result, expected)
                    row["is_right"] = row["error"] <= tolerance
                keeps = self.results_kept(result, len(sets))
                del result
                self._time(case, row, calls, keeps)
            except SkippedError as reason:
                row["skipped"] = str(reason)
            except Exception as error:  # one way that fails shall not cost the others
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            calls = []
        del expected, sets
        if self.device == "cuda":
            if torch.cuda.memory_allocated() > MUCH:
                gc.collect()  # graphs of autograd may hold on to one another
            torch.cuda.empty_cache()
        return rows

    def count_kernels(self, case: Case, rows: list[dict[str, Any]]) -> None:
        """Into the rows of ways that were timed: what each call launches."""
        inputs = case.inputs()
        for row in rows:
            if "seconds" in row:
                try:
                    with tf32(case.tf32):
                        row["kernels"] = kernels_of(case.ways[row["way"]](inputs), self.device)
                except Exception as error:  # no profiler here
                    row["kernels"], row["note"] = None, f"kernels not counted: {error}"[:200]

    def warm(self, case: Case) -> None:
        """Call what may have to be compiled once, on one set of inputs."""
        inputs = case.inputs()
        for way, prepare in case.ways.items():
            if way in (*OURS, "torch.compile"):
                with tf32(case.tf32), contextlib.suppress(Exception):  # whoever times it says what is wrong
                    prepare(inputs)()

    def _time(self, case: Case, row: dict[str, Any], calls: list[Call], keeps: int) -> None:
        kept: deque[Any] = deque(maxlen=keeps)
        timing = self.timer.time([keeping(call, kept) for call in calls], case.asks_ahead)
        kept.clear()
        row |= {
            "seconds": [timing.seconds],
            "low": timing.low,
            "high": timing.high,
            "asking": timing.asking,
            "calls": timing.calls,
            "bytes": case.bytes,
            "operations": case.operations,
            "note": case.notes.get(row["way"], ""),
        }
        if case.peak_stated is not None:
            row |= {"peak": peak_of(calls[0], self.device), "peak_stated": case.peak_stated}


def finish(bench: Bench, case: Case, rows: list[dict[str, Any]]) -> None:
    """What can be said when all ways, and all passes, are there: shares of the ceiling and targets."""
    floor = bench.floor(case)
    by_way = {row["way"]: row for row in rows}
    for row in rows:
        if "seconds" not in row:
            continue
        best = min(row["seconds"])
        row["share"] = floor / best if floor else None
        row["spread"] = max(row["seconds"]) / best - 1
        if row["way"] in OURS:
            row["targets"] = {t.text: t.is_met(row, by_way) for t in case.targets}


def answering(case: Case, device: str) -> str:
    """The way that a user gets: the library's public call, or the backend that answers for the case's op and size."""
    if case.op is None or "kdaif_fast" in case.ways:
        return "kdaif_fast"
    op = getattr(torch.ops.kdaif_fast, case.op).default
    if device == "cpu":
        return _library.kernel_for(op, "cpu")
    order = _library._orders_on_cuda[op]
    return order[case.size or "large"][0]
