"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
MINUS = "−"
SPACE = "\u202f"
"""A narrow one that does not break, between a number and its unit."""


def number(value: Any, digits: int = 3) -> str:
    """So many significant digits; a dash for None.

    >>> number(0.98765), number(12.0), number(1200), number(0.000012), number(None), number(float("nan"))
    ('0.988', '12.0', '1200', '1.20e−05', '–', 'NaN')
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    if isinstance(value, int):
        text = str(value)
    elif value == 0:
        text = "0"
    elif 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", MINUS)


def signed(value: Any, digits: int = 3) -> str:
    """The same, with its sign always.

    >>> signed(0.5), signed(-0.5)
    ('+0.500', '−0.500')
    """
    text = number(value, digits)
    return f"+{text}" if isinstance(value, (int, float)) and value > 0 else text


def decimals(value: Any, places: int = 3, sign: bool = False) -> str:
    """So many decimals, for columns and for what is near 1.

    >>> decimals(0.98765), decimals(-0.02, 1), decimals(2.5, 1, sign=True), decimals(None), decimals(float("inf"))
    ('0.988', '0.0', '+2.5', '–', '∞')
    """
    if value is None or not math.isfinite(value):
        return number(value)
    rounded = round(value, places) + 0.0  # + 0.0: no minus before zero
    return ("+" if sign and rounded > 0 else "") + f"{rounded:.{places}f}".replace("-", MINUS)


def percent(share: Any) -> str:
    """A share in percent, with one decimal.

    >>> percent(0.9412).replace(SPACE, " "), percent(None)
    ('94.1 %', '–')
    """
    if share is None or not math.isfinite(share):
        return number(share)
    return f"{100 * share:.1f}{SPACE}%".replace("-", MINUS)


def seconds_text(seconds: Any) -> str:
    """A time with its unit.

    >>> [seconds_text(s).replace(SPACE, " ") for s in (0.0123, 5.0, 75.0, 7380.0)]
    ['0.012 s', '5.0 s', '1 min 15 s', '2 h 3 min']
    """
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if seconds < 60:
        return f"{seconds:.{3 if seconds < 0.1 else 2 if seconds < 1 else 1}f}{SPACE}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"
