"""The order of kernels on CUDA, from a file of results: kdaif_fast/_cuda_order.json.

    python -m benchmarks.gpu.order benchmarks/results/X.json     writes the table that follows from it
    python -m benchmarks.gpu.order estimate                      the one that was guessed before any GPU had run it

A kernel's cost in a case is what the GPU needs or what the CPU needs to ask for it, whichever is longer. Of each op and
size class, kernels are ordered by the geometric mean, over cases, of their cost in units of the best one's. Differences
below 3 % leave the order of the estimate. One whose result was wrong, or that failed, comes last; so does one that was
not measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdaif_fast._cuda_order import CLASSES, ESTIMATE, FILE, SIZES, USUAL

from .files import read_json, write

ROOT = Path(__file__).parents[2]
NOISE = 1.03
Table = dict[str, dict[str, list[str]]]

# Compiled kernels start in a fifth of the time that Triton's take from Python. persample_dot in CUDA C++ does not use
# tensor cores, or stores the product that Triton's kernel keeps in registers.
# "torch", what is composed of torch's own operations, is there for ops that no other backend has.
BACKENDS = [backend for backend in USUAL if backend != "torch"]
_FIRST_BY_ESTIMATE = {"persample_dot": ["triton", "cuda", "reference"]}
ESTIMATES: Table = {op: {size: list(_FIRST_BY_ESTIMATE.get(op, BACKENDS)) for size in CLASSES} for op in sorted(SIZES)}


def cost(row: Mapping[str, Any]) -> float | None:
    """Seconds; None if there is no right result."""
    if "seconds" not in row or row.get("is_right") is False:
        return None
    return max(min(row["seconds"]), row["asking"])


def relative_costs(rows: Iterable[Mapping[str, Any]], op: str, size: str) -> dict[str, float]:
    """Backend -> geometric mean over the cases in which it and another were measured; infinite if it failed in one."""
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        is_of_it = row["case"] == op and row.get("size") == size and row["way"] in BACKENDS
        if is_of_it and "skipped" not in row:
            found = cost(row)
            cases.setdefault((row["shape"], row["dtype"]), {})[row["way"]] = math.inf if found is None else found
    logs: dict[str, list[float]] = {}
    for found in cases.values():
        best = min(found.values())
        if len(found) > 1 and math.isfinite(best):
            for way, seconds in found.items():
                logs.setdefault(way, []).append(math.log(seconds / best) if seconds < math.inf else math.inf)
    return {way: math.exp(sum(values) / len(values)) for way, values in logs.items()}


def ordered(estimate: list[str], costs: Mapping[str, float]) -> list[str]:
    """The estimate's order, changed where the measurements say so."""
    left, found = list(estimate), []
    while left:
        best = left[0]
        for other in left[1:]:
            if costs.get(other, math.inf) * NOISE < costs.get(best, math.inf):
                best = other
        left.remove(best)
        found.append(best)
    return found


def table_of(results: Mapping[str, Any]) -> Table:
    """The order that measurements say."""
    rows = results["benchmarks"]["rows"]
    return {
        op: {size: ordered(estimate, relative_costs(rows, op, size)) for size, estimate in classes.items()}
        for op, classes in ESTIMATES.items()
    }


def text_of(source: str, table: Table) -> str:
    """The file: an op a line."""
    lines = [f'  "{op}": {json.dumps(classes)}' for op, classes in sorted(table.items())]
    return f'{{\n "source": {json.dumps(source)},\n "order": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def text_from(source: str) -> str:
    """The file that follows from a source: "estimate", or a file of results, named from the repository's root."""
    if source == ESTIMATE:
        return text_of(ESTIMATE, ESTIMATES)
    results = read_json(ROOT / source)
    if results is None or not results.get("benchmarks", {}).get("rows"):
        raise SystemExit(f"{source} has no measurements")
    if results.get("rehearsal"):
        raise SystemExit(f"{source} is of a rehearsal, without a GPU")
    return text_of(source, table_of(results))


def main() -> None:
    """The command."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    source = sys.argv[1]
    if source != ESTIMATE:
        source = Path(source).resolve().relative_to(ROOT).as_posix()
    write(FILE, text_from(source))
    print(f"{FILE.relative_to(ROOT)}: by {source}")


if __name__ == "__main__":
    main()
