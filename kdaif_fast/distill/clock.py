"""Where a training's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

PARTS = ("data", "teacher", "student", "influence", "evaluation")


class Clock:
    """Seconds of the process's own time by part, since the last `reset`.

    On a GPU what is measured is when work was handed over, unless something waits for it: the sum is right, the shares
    are rough.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done within it towards this part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def reset(self) -> None:
        """Start again at 0."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
