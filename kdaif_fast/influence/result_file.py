"""Scores in a file, written batch by batch, with a record beside it from which a run that was killed goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replaced
from .array_files import ArrayFile, require_writable
from .fingerprint import differences, digest

SECONDS_BETWEEN_RECORDS = 1.0
"""How much scoring is lost at most by a kill; each record waits for the disk."""

VERSION = 1


class ResultFile:
    """`path` holds phi, `path`.progress.json how far it is, `path`.solution.npy the solution of the solve.

    The data reach the disk before the record says so, and a record replaces the one before in one step, so that at
    any moment what the record says is true.

    Args:
        path: ends in .npy or .safetensors (its tensor is called "phi").
        settings: what the scores depend on; a record with others is refused.
        resume: whether to go on with what is there; else it is written over.

    Raises:
        ValueError: a path that ends otherwise; a record with other settings; a file without a record.
        OSError: nothing can be written there, or there is not enough room.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], resume: bool = True) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".npy", ".safetensors"):
            raise ValueError(f"out is {str(path)!r}, expected a path that ends in .npy or .safetensors")
        self._record_path, self._solution_path = (
            _beside(self.path, end) for end in (".progress.json", ".solution.npy")
        )
        require_writable(self.path)
        self._file: ArrayFile | None = None
        self._recorded = time.monotonic()
        self._record: dict[str, Any] = {"version": VERSION, "settings": dict(settings), "done": 0}
        if not (resume and self._continue()):
            self._write_record()  # what was there before must not be taken for this run's

    def _continue(self) -> bool:
        """Take over the record of a run before, if there is one that has got anywhere."""
        if not self._record_path.exists():
            if self.path.exists():
                raise ValueError(
                    f"out is {str(self.path)!r}, which exists, and {self._record_path.name} does not, so what is in it "
                    "is not known: give another path, or resume=False to write over it"
                )
            return False
        try:
            before = json.loads(self._record_path.read_text())
            settings, done = before["settings"], int(before["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._record_path} is no record of this library ({error}): give another out, or resume=False"
            ) from error
        if "solution" not in before or not self._solution_path.exists():
            return False
        # Through JSON and back: tuples become lists, float32 a decimal.
        found = differences(settings, json.loads(json.dumps(self._record["settings"])))
        if before.get("version") != VERSION:
            found.append(f"version was {before.get('version')!r} and is {VERSION!r}")
        if found:
            raise ValueError(
                f"out is {str(self.path)!r}, which was begun with other settings: {'; '.join(found)}. Give another "
                "path, or resume=False to start over"
            )
        if done and not self.path.exists():
            before["done"] = 0
        self._record = before
        return True

    @property
    def done(self) -> int:
        """How many samples have their scores in the file."""
        return int(self._record["done"])

    def start_over(self) -> None:
        """Forget what a run before has done."""
        self._record = {"version": VERSION, "settings": self._record["settings"], "done": 0}
        self._write_record()

    def solution(self) -> tuple[Tensor, dict[str, Any]] | None:
        """x and the report of a solve that is finished, or None."""
        import numpy as np

        report = self._record.get("solution")
        if report is None:
            return None
        x = torch.from_numpy(np.load(self._solution_path))
        if digest([x]) != report["digest"]:
            raise ValueError(
                f"{self._solution_path} is not the solution that {self._record_path.name} is about: resume=False "
                "starts over"
            )
        return x, report

    def save_solution(self, x: Tensor, report: Mapping[str, Any]) -> None:
        """Keep x [P] or [K, P], and what the solve says of it (for JSON)."""
        import numpy as np

        with replaced(self._solution_path) as part, part.open("wb") as file:
            np.save(file, x.detach().cpu().numpy())
        self._record["solution"] = {**report, "digest": digest([x])}
        self._write_record()

    def allocate(self, samples: int, queries: int | None, dtype: torch.dtype) -> None:
        """Make room for phi, [N] or [N, K], or open what a run before has made; what is not scored yet is NaN.

        Raises OSError if the disk is too full, ValueError if the file of a run before has another shape.
        """
        shape = (samples,) if queries is None else (samples, queries)
        if self._file is not None:
            return
        if self.done:
            self._file = ArrayFile.open(self.path)
            if self._file.values.shape != shape:
                raise ValueError(
                    f"{self.path} has the shape {self._file.values.shape}, but there are scores of shape {shape} to "
                    "write: resume=False starts over"
                )
            return
        self._file = ArrayFile.create(self.path, shape, dtype)
        self._record["samples"] = samples
        self._write_record()

    def write(self, rows: Tensor) -> None:
        """The scores of the next samples: [n, K], or [n, 1] for a file [N]."""
        assert self._file is not None
        values, start = self._file.values, self.done
        stop = start + len(rows)
        if stop > len(values):
            raise ValueError(f"there are more samples than the {len(values)} that {self.path} was made for")
        values[start:stop] = rows.reshape(len(rows), *values.shape[1:]).cpu().numpy()
        self._record["done"] = stop
        if time.monotonic() - self._recorded >= SECONDS_BETWEEN_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Data to the disk, then the record."""
        if self._file is not None:
            self._file.flush()
        self._write_record()
        self._recorded = time.monotonic()

    def scores(self) -> Tensor:
        """phi, mapped from the file: read when it is looked at; writing to it does not change the file."""
        return torch.from_numpy(ArrayFile.open(self.path, "c").values)

    def _write_record(self) -> None:
        with replaced(self._record_path) as part:
            part.write_text(json.dumps(self._record, indent=1))


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)
