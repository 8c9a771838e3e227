"""A pytest plugin: writes each test's outcome as soon as it is known, so that a run that is stopped has counted.

Loaded by `-p benchmarks.gpu.recorder`; the variable KDAIF_GPU_RECORD names the file. Under pytest-xdist the process
that hands out the tests writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIABLE = "KDAIF_GPU_RECORD"
MOST_NAMED = 40


class Recorder:
    """One line a test: outcome, name, and the reason of a skip."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (as long as the process lives)

    def write(self, outcome: str, name: str, why: str = "") -> None:
        """One line."""
        self.file.write(json.dumps([outcome, name, why]) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for the setup, the call and the teardown of each test."""
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome
            if outcome == "failed" and report.when != "call":
                outcome = "error"
            why = ""
            if outcome == "skipped":
                why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
            self.write(outcome, report.nodeid, why.removeprefix("Skipped: "))

    def pytest_collectreport(self, report: Any) -> None:
        """A file that could not be imported, or is skipped as a whole."""
        if report.outcome == "failed":
            self.write("error", report.nodeid, "could not be collected")
        elif report.outcome == "skipped":
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.write("skipped", report.nodeid, why.removeprefix("Skipped: "))


def pytest_configure(config: Any) -> None:
    """Register it, but not in workers."""
    path = os.environ.get(VARIABLE)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "kdaif-gpu-recorder")


def counts(paths: Iterable[Path]) -> dict[str, Any]:
    """Of all records: how many tests had which outcome, which failed, and what was skipped for which reason."""
    found: Counter[str] = Counter()
    failed: list[str] = []
    reasons: Counter[str] = Counter()
    seen = set()
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                outcome, name, why = json.loads(line)
            except ValueError:
                continue  # the last one, cut off
            if (outcome, name) in seen:
                continue  # every worker of pytest-xdist collects every file
            seen.add((outcome, name))
            found[outcome] += 1
            if outcome in ("failed", "error"):
                failed.append(name)
            elif outcome == "skipped":
                reasons[why or "no reason"] += 1
    return {**found, "failures": failed[:MOST_NAMED], "skip_reasons": dict(reasons.most_common(MOST_NAMED))}
