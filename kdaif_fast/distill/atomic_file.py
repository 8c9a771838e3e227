"""Files that are whole at any moment: replaced in one step, or grown by all of something or nothing."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` by way of a file beside it, so that a reader sees the old content or the new one.

    Raises OSError where there is no room or no permission; the file that was there is then as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    _settle_folder(path.parent)


def append_whole(path: Path, content: bytes, to_disk: bool = False) -> None:
    """Add `content` to the end of a file, and wait until it is on the disk if asked to.

    Raises OSError where there is no room; the file is then as it was. (A kill may leave a part of the content.)
    """
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            if to_disk:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _settle_folder(folder: Path) -> None:
    """The new name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
