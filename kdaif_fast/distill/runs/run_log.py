"""What a run has measured, epoch by epoch: log.jsonl, log.csv, and TensorBoard for those who want it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..._files import append_whole, write_whole

LOG, TABLE = "log.jsonl", "log.csv"
KINDS = ("epoch", "refresh")

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How JSON, which has no such numbers, holds them: what protobuf's JSON does, and other readers understand."""


class RunLog:
    """The records of a run, in its folder and in memory.

    log.jsonl has one JSON object a line; log.csv has the numbers of the epoch records, one epoch a row, nested ones
    under joined names (`seconds_influence`). Every record is in the hands of the operating system when `write` returns,
    and on the disk after an epoch's. A line that a kill has cut is dropped when the folder is opened again.

    Args:
        run_dir: the run's folder, made if it is not there; what it holds is gone on with. None: nothing on disk.
        tensorboard: whether to write numbers and the weights' histogram for TensorBoard too, to `run_dir`/tensorboard.

    Raises:
        ImportError: tensorboard is asked for and not installed.
        ValueError: tensorboard without a folder; a log with a line, other than its last, that is no record.
        OSError: nothing can be written there.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> log = RunLog(folder.name)
        >>> log.write({"kind": "epoch", "epoch": 1, "step": 20, "mean_weight": 0.98, "seconds": {"student": 1.5}})
        >>> log.write({"kind": "epoch", "epoch": 2, "step": 40, "mean_weight": 0.97, "seconds": {"student": 1.4}})
        >>> log.rewind(20)
        >>> [record["epoch"] for record in RunLog(folder.name).records()]
        [1]
        >>> print((Path(folder.name) / "log.csv").read_text().strip())
        epoch,step,mean_weight,seconds_student
        1,20,0.98,1.5
        >>> log.close(); folder.cleanup()
    """

    def __init__(self, run_dir: str | os.PathLike[str] | None, tensorboard: bool = False) -> None:
        self._folder = None if run_dir is None else Path(run_dir)
        self._records: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._board: _Board | None = None
        if tensorboard:
            if self._folder is None:
                raise ValueError("tensorboard is True, but run_dir is None: expected a folder to write to")
            self._board = _Board(self._folder / "tensorboard")
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / LOG).exists():
                self._records = read_log(self._folder)
                self._rewrite()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record: "kind" ("epoch" or "refresh"), "epoch", "step", and numbers, texts, lists and mappings of them.

        Raises TypeError, naming the place, for a value that is none of these, ValueError for a record of another kind,
        OSError where there is no room; log.jsonl is then as it was.
        """
        plain: dict[str, Any] = _plain(record, "record")
        if plain.get("kind") not in KINDS:
            raise ValueError(f"record has the kind {plain.get('kind')!r}, expected one of {', '.join(KINDS)}")
        for key in ("epoch", "step"):
            if isinstance(plain.get(key), bool) or not isinstance(plain.get(key), int):
                raise TypeError(f"record[{key!r}] is {plain.get(key)!r}, expected an int")
        is_epoch = plain["kind"] == "epoch"
        if self._folder is not None:
            append_whole(self._folder / LOG, _line(plain), to_disk=is_epoch)
        self._records.append(plain)
        if self._folder is not None and is_epoch:
            self._add_row(plain)
        if self._board is not None:
            self._board.write(plain)

    def rewind(self, step: int, epoch: int | None = None, *, is_inside: bool = True) -> None:
        """Drop the records of what came later: for a run that goes on from a checkpoint made at this step.

        Args:
            step: of the checkpoint.
            epoch: how many epochs were finished. Records of the same step can be of more: the epoch ended, and the
                process was killed before it could be checkpointed.
            is_inside: whether it is from within an epoch; if not, what was measured at that epoch's start came later.
        """

        def is_before(record: Mapping[str, Any]) -> bool:
            if record["step"] != step or epoch is None:
                return bool(record["step"] <= step)
            is_begun = record["kind"] == "epoch" or is_inside
            return bool(record["epoch"] <= epoch if is_begun else record["epoch"] < epoch)

        kept = list(filter(is_before, self._records))
        if len(kept) < len(self._records):
            self._records = kept
            if self._folder is not None:
                self._rewrite()
        if self._board is not None:
            self._board.purge(step + 1)

    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first; a list of its own."""
        return list(self._records)

    def close(self) -> None:
        """Finish what TensorBoard still holds back; the other files are always finished."""
        if self._board is not None:
            self._board.close()

    def _rewrite(self) -> None:
        assert self._folder is not None
        write_whole(self._folder / LOG, b"".join(map(_line, self._records)))
        self._write_table()

    def _write_table(self) -> None:
        assert self._folder is not None
        rows = [_row(record) for record in self._records if record["kind"] == "epoch"]
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        write_whole(self._folder / TABLE, _csv(self._columns, rows, header=True))

    def _add_row(self, record: Mapping[str, Any]) -> None:
        assert self._folder is not None
        row = _row(record)
        if not self._columns or not set(row) <= set(self._columns):
            self._write_table()
            return
        append_whole(self._folder / TABLE, _csv(self._columns, [row], header=False))


def read_log(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run's folder, oldest first, without a last line that a kill has cut; changes nothing there.

    Raises FileNotFoundError where there is no log, ValueError, naming the line, for another line that is no record.
    """
    path = Path(run_dir) / LOG
    if not path.exists():
        raise FileNotFoundError(f"run_dir is {str(run_dir)!r}, expected the folder of a run: it has no {LOG}")
    written = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    records = []
    for number, line in written:
        try:
            records.append(_record(line))
        except ValueError as error:
            if number == written[-1][0]:
                break
            raise ValueError(f"{path}, line {number}: no record of a run ({error})") from error
    return records


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by flat names: those of nested mappings joined by "_"; lists, texts and None left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat


def _record(line: bytes) -> dict[str, Any]:
    found = _restored(json.loads(line.decode()))
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        raise ValueError(f"expected an object whose kind is one of {', '.join(KINDS)}")
    if not isinstance(found.get("step"), int) or not isinstance(found.get("epoch"), int):
        raise ValueError("expected whole numbers for epoch and step")
    return found


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_spelled(record), allow_nan=False).encode() + b"\n"


def _row(record: Mapping[str, Any]) -> dict[str, float | None]:
    """A row of the table; what is None has a column too, so that the header need not grow for it."""
    return {**dict.fromkeys(key for key, value in record.items() if value is None), **numbers(record)}


def _csv(columns: list[str], rows: list[dict[str, Any]], header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted(columns, key=("epoch", "step").__contains__, reverse=True), restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _plain(value: Any, place: str) -> Any:
    """The value in Python's own types."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}, expected names")
        return {key: _plain(inner, f"{place}[{key!r}]") for key, inner in value.items()}
    if hasattr(value, "tolist"):  # tensors, arrays, and their numbers
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{place}[{at}]") for at, inner in enumerate(value)]
    if isinstance(value, (bool, int, float)):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}, expected numbers, texts, or lists and mappings of them")


def _spelled(value: Any) -> Any:
    """The value with numbers that are not finite as words."""
    if isinstance(value, Mapping):
        return {key: _spelled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_spelled(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_restored(inner) for inner in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


class _Board:
    """TensorBoard's files of a run."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=True needs tensorboard: pip install tensorboard") from error
        self._new_writer = SummaryWriter
        self._folder = folder
        self._writer: Any = None
        self._purge_step: int | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:  # only now, because a run that goes on purges first
            self._writer = self._new_writer(str(self._folder), purge_step=self._purge_step)
        prefix = "refresh/" if record["kind"] == "refresh" else ""
        for name, number in numbers(record).items():
            if name != "step":
                self._writer.add_scalar(prefix + name, number, record["step"])
        histogram = record.get("weight_histogram") or {}
        edges = histogram.get("edges")
        for kind, counts in histogram.items():
            if kind != "edges" and edges and len(counts) == len(edges) - 1:
                self._write_histogram(f"weights/{kind}", edges, counts, record["step"])
        self._writer.flush()

    def purge(self, step: int) -> None:
        """Have TensorBoard forget this step and all later ones."""
        self.close()
        self._purge_step = step

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._purge_step = None

    def _write_histogram(self, name: str, edges: list[float], counts: list[float], step: int) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )
