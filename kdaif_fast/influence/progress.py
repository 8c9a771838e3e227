"""A progress bar over the batches of a loader."""

from __future__ import annotations

from collections.abc import Iterator

from .._data import Batches
from .._model import Batch
from .._progress import bar


def track(batches: Batches, what: str, progress: bool | None) -> Iterator[tuple[str, Batch]]:
    """The batches, with a progress bar: None shows it on a terminal only, and for a loader only."""
    if progress is None and batches.is_one:
        progress = False
    with bar(progress, total=batches.count, desc=what, unit="batch") as shown:
        for label, batch in batches:
            yield label, batch
            shown.update()
