"""The device that cases are for, and whether they are the real ones or a rehearsal's."""

from __future__ import annotations

from typing import NamedTuple


class Scale(NamedTuple):
    """tiny: sizes that a CPU does in milliseconds, to see that everything runs."""

    device: str
    tiny: bool
