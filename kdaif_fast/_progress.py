"""A progress bar where one is shown; who shows none needs no tqdm."""

from __future__ import annotations

import sys
from typing import Any


def bar(progress: bool | None, **options: Any) -> Any:
    """tqdm's bar, or a stand-in for it that shows nothing.

    Args:
        progress: whether to show it; None shows it on a terminal only.
        options: of tqdm.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return _Hidden()
    from tqdm import tqdm

    return tqdm(**options)


class _Hidden:
    """What is used of a bar."""

    disable = True
    n = 0

    def __enter__(self) -> _Hidden:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    update = close = set_description = set_description_str = set_postfix_str = _nothing
