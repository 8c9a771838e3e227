"""The state of a run in one .safetensors file, which is whole at any moment."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._files import replaced
from .state_tree import put_together, take_apart

KIND = "state of kdaif_fast"
"""What the metadata of such a file say it is."""

FORMAT = 1
"""Goes up when the files of before cannot be read in the same way any more."""

_LARGEST_STRUCTURE = 50_000_000  # bytes; the header of a .safetensors file may have 100 million, with the names
_PACKAGE = "needs safetensors: pip install 'kdaif-fast[train]'"


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this library."""


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write a tree of tensors and plain values to one .safetensors file, all or nothing.

    Whatever happens, a kill or a full disk, there is at any moment either what `path` was before or all of the new
    state. Tensors are in the file under their place in the tree, "student/0.weight", for any reader of safetensors;
    the structure of the tree and its plain values are in the metadata, as JSON. Nothing is pickled.

    Args:
        path: of the file; its folder must exist. One process at a time writes there: with several, let the first.
        state: dictionaries (also OrderedDict and Counter), lists and tuples, nested, of: tensors and parameters, dense,
            of any dtype, on any device; arrays and numbers of numpy; numbers, strings, bytes, bools, None; torch.Size,
            torch.dtype, torch.device. Keys: strings, numbers, bools, None, or tuples of them. Optimizers, schedulers
            and modules have such state dicts, unless they hold functions.

    Raises:
        TypeError: something else in the tree; says where. Nothing is written.
        ValueError: so many plain values that they belong into a tensor.
        FileNotFoundError, IsADirectoryError, OSError: nothing can be written there, or there is not enough room.
        ImportError: without the package safetensors.

    Memory: tensors on the CPU are written from where they are, if they are contiguous up to a permutation of
    dimensions (older versions of safetensors make a copy as bytes); others are copied to the CPU first, all of them.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_state(f"{folder}/run.safetensors", {"weights": torch.ones(2), "epoch": (3, 0.5), 7: None})
        ...     read_state(f"{folder}/run.safetensors")
        {'weights': tensor([1., 1.]), 'epoch': (3, 0.5), 7: None}
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(f"write_state {_PACKAGE}") from None
    structure, tensors = take_apart(state)
    tensors = tensors or {"nothing": torch.empty(0)}  # the first versions of safetensors cannot read a file of none
    text = json.dumps(structure, allow_nan=False, separators=(",", ":"))
    if len(text) > _LARGEST_STRUCTURE:
        raise ValueError(
            f"state has {len(text):,} bytes of plain values, expected {_LARGEST_STRUCTURE:,} at most: put long lists "
            "of numbers into tensors"
        )
    metadata = {"kind": KIND, "format": str(FORMAT), "structure": text}
    try:
        with replaced(path) as part:
            save_file(tensors, part, metadata)
    except SafetensorError as error:
        # What the system said is in its words only: "os error 28", in older versions "code: 28", is a full disk.
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, f"the state could not be written: {error}", os.fspath(path)) from error


def read_state(path: str | os.PathLike[str]) -> Any:
    """The tree that write_state was given.

    Types, dtypes and every bit of the numbers are as they were, also inf, NaN and the order of dictionaries. Tensors
    are on the CPU, with their strides if they were contiguous up to a permutation of dimensions, and without
    gradient. Those that were one tensor are one again; other views of shared memory are tensors of their own.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file.
        CheckpointError: a file that is cut short or damaged, made by something else, or by a later version.
        ImportError: without the package safetensors.

    Memory: that of the state; the file is read tensor by tensor.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"read_state {_PACKAGE}") from None
    path = Path(path)
    with path.open("rb") as raw:  # so that what is missing, or no file, is said by the system
        start = raw.read(9)
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            structure = _structure(path, file.metadata() or {}, names)

            def tensor(name: str) -> Tensor:
                if name not in names:
                    raise KeyError(name)
                # Cloned: in memory of its own, aligned as any tensor's is, on which the last bit of a matrix product
                # can depend; a mapped one would also hold on to a file that is replaced meanwhile.
                return file.get_tensor(name).clone()

            try:
                return put_together(structure, tensor)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: its structure does not fit ({error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} {_what_it_is(start, path.stat().st_size, str(error))}") from error


def _structure(path: Path, metadata: Mapping[str, str], names: set[str]) -> Any:
    if metadata.get("kind") != KIND:
        made_of = ", ".join([*map(repr, sorted(names)[:3]), *(["..."] if len(names) > 3 else [])])
        raise CheckpointError(
            f"{path} is a .safetensors file with {len(names)} tensors ({made_of}) that write_state has not made: "
            "expected a checkpoint of kdaif_fast"
        )
    if metadata.get("format") != str(FORMAT):
        raise CheckpointError(
            f"{path} has the format {metadata.get('format')!r}, expected {str(FORMAT)!r}: it was written by another "
            "version of kdaif_fast"
        )
    try:
        return json.loads(metadata["structure"])
    except (KeyError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its structure cannot be read ({error})") from error


def _what_it_is(start: bytes, size: int, error: str) -> str:
    """What a file is that safetensors cannot open."""
    if not size:
        return "is empty, expected a checkpoint"
    if start.startswith(b"PK"):
        return "is a zip archive, as torch.save makes them, expected a .safetensors file that write_state has made"
    # Eight bytes of length, then a JSON object.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return f"is cut short or damaged: {size:,} bytes ({error})"
    return f"is no .safetensors file: {error}"
