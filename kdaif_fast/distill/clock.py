"""Where a training's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

PARTS = ("data", "teacher", "student", "influence", "evaluation")


class Clock:
    """Seconds of the process's own time by part, since the last `reset`.

    On a GPU what is measured is when work was handed over, unless something waits for it: the sum is right, the shares
    are rough.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done within it towards this part."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start

    def reset(self) -> None:
        """Start again at 0."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
