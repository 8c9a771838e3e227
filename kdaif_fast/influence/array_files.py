"""One array in a .npy or .safetensors file that is mapped into memory and written in place."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    import numpy as np

NAME = "phi"
"""The tensor's name in a .safetensors file."""

_DTYPES = {"F32": "<f4", "F64": "<f8"}
_AT_ONCE = 1 << 22  # elements that are filled together
_ALIGNMENT = 64  # of a .safetensors file's data: the format asks for 8, vector loads like more


class ArrayFile:
    """A file of one array; `values` is a view of it."""

    def __init__(self, path: Path, values: np.memmap[Any, Any]) -> None:
        self.path, self.values = path, values

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> ArrayFile:
        """A new file, full of NaN. Raises OSError at once if there is not enough room; then no file is left."""
        import numpy as np

        kind = np.dtype("<f8" if dtype == torch.float64 else "<f4")
        header = _npy_header(shape, kind) if path.suffix == ".npy" else _safetensors_header(shape, kind)
        size = len(header) + math.prod(shape) * kind.itemsize
        try:
            path.unlink(missing_ok=True)  # who has mapped the file before keeps what was in it
            with path.open("wb") as file:
                file.write(header)
                file.flush()
                # A mapped page without room on the disk would end the process when it is written to.
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, f"out needs {size:,} bytes, but {error.strerror}", str(path)) from error
        made = cls(path, np.memmap(path, kind, "r+", len(header), shape))
        flat = made.values.reshape(-1)
        for start in range(0, len(flat), _AT_ONCE):
            flat[start : start + _AT_ONCE] = np.nan
        return made

    @classmethod
    def open(cls, path: Path, mode: Literal["r+", "c"] = "r+") -> ArrayFile:
        """A file that create has made; mode "c" maps it so that writing changes only what this process sees."""
        import numpy as np

        if path.suffix == ".npy":
            return cls(path, np.lib.format.open_memmap(path, mode=mode))
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[NAME]
        kind: np.dtype[Any] = np.dtype(_DTYPES[entry["dtype"]])
        return cls(path, np.memmap(path, kind, mode, 8 + length, tuple(entry["shape"])))

    def flush(self) -> None:
        """Everything written so far is on the disk afterwards."""
        self.values.flush()


def require_writable(path: Path) -> None:
    """Raise OSError unless a file can be made and written there; nothing that exists is changed."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out is {str(path)!r}, but {str(path.parent)!r} is no folder")
    if path.is_dir():
        raise IsADirectoryError(f"out is {str(path)!r}, which is a folder")
    probe = path.with_name(path.name + ".part")
    try:
        with probe.open("ab"):
            pass
        probe.unlink()
        if path.exists():
            with path.open("r+b"):
                pass
    except OSError as error:
        raise OSError(error.errno, f"out cannot be written: {error.strerror}", str(path)) from error


def _npy_header(shape: tuple[int, ...], kind: np.dtype[Any]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _safetensors_header(shape: tuple[int, ...], kind: np.dtype[Any]) -> bytes:
    """Eight bytes of length, then JSON, filled up with spaces (the format's own description, version 0.4)."""
    (name,) = (key for key, dtype in _DTYPES.items() if dtype == kind.str)
    entry = {"dtype": name, "shape": list(shape), "data_offsets": [0, math.prod(shape) * kind.itemsize]}
    text = json.dumps({"__metadata__": {"made_by": "kdaif_fast", "sign": "phi > 0 is harmful"}, NAME: entry}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
