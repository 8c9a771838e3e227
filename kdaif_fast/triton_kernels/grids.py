"""How many programs a launch has: a GPU counts them in 31 bits along a grid's first side, in 16 along the others."""

from __future__ import annotations

import math

MOST_PROGRAMS = 2**31 - 1
MOST_ALONG_ANOTHER_SIDE = 2**16 - 1


def programs(op: str, *counts: int) -> int:
    """The product of the counts, where the first side of a grid can be as long.

    Args:
        op: for the message.
        *counts: rows, parts, tiles, ...

    Raises:
        ValueError: if it is too long.

    Example:
        >>> programs("row_stats", 1000, 3)
        3000
    """
    return _at_most(MOST_PROGRAMS, op, math.prod(counts), "rows")


def groups(op: str, count: int, of_what: str) -> int:
    """The count, where the second side of a grid can be as long.

    Args:
        op: for the message.
        count: groups of what the message names.
        of_what: what to pass less of.

    Raises:
        ValueError: if it is too long.

    Example:
        >>> groups("row_divergence_hvp", 3, "tangents")
        3
    """
    return _at_most(MOST_ALONG_ANOTHER_SIDE, op, count, of_what)


def _at_most(limit: int, op: str, count: int, of_what: str) -> int:
    if count > limit:
        raise ValueError(
            f"{op}: one side of the launch's grid would be {count}, expected at most {limit}; "
            f"pass fewer {of_what} at a time"
        )
    return count
