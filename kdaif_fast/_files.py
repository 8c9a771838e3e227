"""Files that are whole at any moment: replaced in one step, or grown by all of something or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path`, in one step, when the block ends.

    At any moment `path` is what it was before or all that was written, also after a kill or a power cut: the data
    reach the disk before the name does. If the block raises, `path` is left as it was. What a killed writer has left
    beside it is removed by the next one. One process at a time writes to a path.

    Raises:
        FileNotFoundError, IsADirectoryError: the folder is not there; there is a folder at `path`.
        OSError: nothing can be written there, or there is not enough room.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replaced(f"{folder}/a.txt") as part:
        ...         _ = part.write_text("all of it")
        ...     Path(folder, "a.txt").read_text()
        'all of it'
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}, but {str(target.parent)!r} is no folder")
    if target.is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, which is a folder")
    # A folder, not a file: some writers make temporary files of their own beside what they are told to write.
    beside = target.with_name(f".{target.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        part = beside / target.name
        with part.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the user's umask has it; some writers are stricter
        yield part
        part.chmod(mode)
        _to_disk(part)
        part.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    with contextlib.suppress(OSError):  # not every file system can; the file is in its place
        _to_disk(target.parent)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Put a file with this content in the place of `path`, in one step. Raises what `replaced` does."""
    with replaced(path) as part:
        part.write_bytes(content)


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


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
