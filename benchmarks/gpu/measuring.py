"""The process that times: ceilings, then every case in the order of importance, then all of them once more.

    python -m benchmarks.gpu.measuring --out FILE [--seconds 150] [--only TEXT] [--ways NAME ...] [--tiny] [--warm i/n]

What is found is written after every case, so that whoever stops it keeps that.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .cases import Bench, Case, answering, finish
from .ceilings import ceilings
from .files import read_json, write_json
from .heads import head_cases
from .layers import convolution_cases, layer_cases, vector_cases
from .norms import norm_cases
from .rows import loss_cases, part_cases, product_cases, stats_cases
from .scale import Scale
from .steps import distillation_cases, influence_cases, step_cases
from .timing import Timer
from .tuners import Tunings

GROUPS: tuple[Callable[[Scale], list[Case]], ...] = (
    *(loss_cases, product_cases, layer_cases, head_cases, step_cases, influence_cases, stats_cases, vector_cases),
    *(norm_cases, part_cases, convolution_cases, distillation_cases),
)
"""By importance; of each group the first half comes before the second half of any."""
CPU_CACHE = 2**20
MOST_TO_WARM = 0.2  # of the GPU's memory: tests are running beside


def cases(scale: Scale, only: str = "", ways: Sequence[str] = ()) -> list[Case]:
    """All cases in whose title the expression `only` is found, the most important first; with these ways, if named."""
    groups = [group(scale) for group in GROUPS]
    early = [case for group in groups for case in group[: (len(group) + 1) // 2]]
    late = [case for group in groups for case in group[(len(group) + 1) // 2 :]]
    found = [case for case in early + late if re.search(only, case.title)]
    if ways:
        found = [replace(case, ways={w: way for w, way in case.ways.items() if w in ways}) for case in found]
    return [case for case in found if case.ways]


class Run:
    """One process's measurements, and the file that they go to."""

    def __init__(self, out: Path, scale: Scale, seconds: float) -> None:
        self.out, self.scale, self.end = out, scale, time.monotonic() + seconds
        self.timer = Timer(scale.device, 0.001 if scale.tiny else 0.12)
        self.tunings = Tunings()
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.skipped: list[str] = []
        self.ceilings: dict[str, float] = {}
        self.cases: dict[str, Case] = {}
        self.passes = 0
        self.now: str | None = None
        self.before: list[dict[str, Any]] = []

    def resume(self) -> set[str]:
        """Take over what a process before this one has written; the titles of the cases that need not be measured.

        The case that it was in when it ended is among them: it is what ended it.
        """
        written = read_json(self.out) or {"rows": [], "skipped": [], "now": None}
        self.before = written["rows"]
        done = {f"{row['case']} {row['shape']} {row['dtype']}" for row in self.before}
        if written["now"] and written["now"] not in done:
            self.before.append(
                {"case": written["now"], "shape": "", "dtype": "", "way": "all", "failed": "it ended the process"}
            )
            done.add(written["now"])
        return done

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.end

    def bench(self) -> Bench:
        """With the ceilings that are known by now."""
        cache = CPU_CACHE
        if self.scale.device == "cuda":
            cache = torch.cuda.get_device_properties(0).L2_cache_size
        return Bench(self.scale.device, self.timer, self.ceilings, cache)

    def measure(self, wanted: list[Case], once: bool = False) -> None:
        """Ceilings, two passes over the cases (or one), and the counts of their kernels."""
        self.ceilings = ceilings(self.timer, self.scale.tiny)
        self.write()
        bench = self.bench()
        for case in wanted:
            if self.is_over():
                self.skipped.append(case.title)
                continue
            start, self.now = time.monotonic(), case.title
            self.write()
            rows = bench.run(case)
            for row in rows:
                row["answers"] = row["way"] == answering(case, self.scale.device)
            self.rows[case.title], self.cases[case.title] = rows, case
            finish(bench, case, rows)
            self.tunings.look(case.title)
            self.now = None
            self.write()
            self.timer.wait()  # a GPU that a kernel has put out of order says so here, and the process ends
            print(f"{time.monotonic() - start:6.1f} s  {case.title}", flush=True)
        self.passes = 1
        if once:
            self.write()
            return
        for title, case in self.cases.items():
            if self.is_over():
                break
            again = {row["way"]: row for row in bench.run(case)}
            for row in self.rows[title]:
                if "seconds" in row and "seconds" in again[row["way"]]:
                    row["seconds"] += again[row["way"]]["seconds"]
            finish(bench, case, self.rows[title])
            self.write()
        else:
            self.passes = 2
        for title, case in self.cases.items():
            if self.is_over():
                break
            bench.count_kernels(case, self.rows[title])
        self.write()

    def warm(self, wanted: list[Case]) -> None:
        """Call everything once: what is compiled is then in the caches on the disk, and timing needs not wait."""
        bench = self.bench()
        if self.scale.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(MOST_TO_WARM)
        for case in wanted:
            if self.is_over():
                return
            bench.warm(case)
            print(f"warm: {case.title}", flush=True)

    def write(self) -> None:
        """What is known so far."""
        content = {
            "ceilings": self.ceilings,
            "rows": self.before + [row for rows in self.rows.values() for row in rows],
            "now": self.now,
            "skipped": self.skipped,
            "passes": self.passes,
            "tunings": self.tunings.found,
        }
        write_json(self.out, content)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--only", default="", help="cases in whose title this regular expression is found")
    parser.add_argument("--ways", nargs="+", default=[], help="only these")
    parser.add_argument("--once", action="store_true", help="one pass")
    parser.add_argument("--resume", action="store_true", help="go on after the case that ended the process before")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in milliseconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm", metavar="i/n", help="only call the i-th of n parts of the cases once")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    run = Run(arguments.out, Scale(arguments.device, arguments.tiny), arguments.seconds)
    done = run.resume() if arguments.resume else set()
    wanted = [c for c in cases(run.scale, arguments.only, arguments.ways) if c.title not in done]
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        run.warm(wanted[part::parts])
    else:
        run.measure(wanted, arguments.once)


if __name__ == "__main__":
    main()
