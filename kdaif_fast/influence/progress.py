"""A progress bar over the batches of a loader."""

from __future__ import annotations

from collections.abc import Iterator

from .._data import Batches
from .._model import Batch


def track(batches: Batches, what: str, progress: bool | None) -> Iterator[tuple[str, Batch]]:
    """The batches, with a progress bar: None shows it on a terminal only, and for a loader only."""
    from tqdm import tqdm

    disable = (True if batches.is_one else None) if progress is None else not progress
    with tqdm(total=batches.count, desc=what, unit="batch", disable=disable) as bar:
        for label, batch in batches:
            yield label, batch
            bar.update()
