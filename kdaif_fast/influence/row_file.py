"""A .npy file that rows are appended to, without knowing beforehand how many there will be."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

HEADER_BYTES = 128
"""Room for the header of a matrix of any size; format 1.0 wants a multiple of 64."""

_TYPES = {torch.float32: "<f4", torch.float64: "<f8"}


class RowFile:
    """A matrix [rows, width] being written; it is at `path` once it is closed, and beside it until then.

    What was at `path` before stays there until then, and stays whole for those who have mapped it.

    Args:
        path: of the .npy file, which is written anew.
        width: of every row.
        dtype: float32 or float64.
    """

    def __init__(self, path: Path, width: int, dtype: torch.dtype) -> None:
        self._width, self._type, self.rows = width, _TYPES[dtype], 0
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._file = self._part.open("wb")
        self._file.write(b"\0" * HEADER_BYTES)

    def append(self, rows: Tensor) -> None:
        """Write [n, width]."""
        assert rows.shape[1] == self._width
        self._file.write(rows.detach().cpu().numpy().astype(self._type, copy=False).tobytes())
        self.rows += len(rows)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            start = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
            form = f"{{'descr': '{self._type}', 'fortran_order': False, 'shape': ({self.rows}, {self._width}), }}"
            self._file.seek(0)
            self._file.write(start + form.ljust(HEADER_BYTES - 11).encode() + b"\n")
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)


def map_rows(path: Path) -> Tensor:
    """The matrix of a file, memory-mapped: read as it is used. Changes do not reach the file.

    Raises ValueError for a file that was not written to its end.
    """
    import numpy as np

    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError(f"{str(path)!r} is not a whole .npy file: it was not written to its end")
    return torch.from_numpy(np.load(path, mmap_mode="c"))
