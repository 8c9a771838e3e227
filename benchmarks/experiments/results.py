"""What runs have found, in files: one JSON a problem, with the settings and versions that it is of."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .methods import METHODS, Settings

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("kdaif-fast", "torch", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Results:
    """The runs of one problem, each written as soon as it is there.

    Args:
        folder: where the file is, or will be.
        problem: a name in PROBLEMS.
        settings: of the runs. A file of other settings, or of other versions, counts for nothing, and is replaced with
            the first new run.
    """

    def __init__(self, folder: Path, problem: str, settings: Settings) -> None:
        self.path, self.problem = folder / f"{problem}.json", problem
        # Through JSON, as tuples come back as lists.
        self._head = json.loads(json.dumps({"settings": settings._asdict(), "versions": versions()}))
        self.runs: dict[tuple[str, int], dict[str, Any]] = {}
        content = read(self.path)
        if content is not None and {key: content.get(key) for key in self._head} == self._head:
            self.runs = {(run["method"], run["seed"]): run for run in content["runs"]}

    def has(self, method: str, seed: int) -> bool:
        """Whether this run is finished."""
        return (method, seed) in self.runs

    def add(self, run: Mapping[str, Any]) -> None:
        """Write it; the file is whole at every moment."""
        self.runs[run["method"], run["seed"]] = dict(run)
        order = list(METHODS)
        runs = sorted(self.runs.values(), key=lambda r: (order.index(r["method"]), r["seed"]))
        lines = ",\n".join("  " + json.dumps(r) for r in runs)
        head = json.dumps({"problem": self.problem, **self._head}, indent=1)[:-2]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n')
        os.replace(temporary, self.path)


def read(path: Path) -> dict[str, Any] | None:
    """The content of a file of results; None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None
