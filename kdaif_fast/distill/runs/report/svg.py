"""Figures of matplotlib as SVG inside a page: its colours are the page's, its texts are texts."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

# The light colours; page.css has the same names, with others for the dark. Okabe and Ito's palette (2008), which people
# with any kind of colour vision tell apart, a little darker where it would be pale on white.
COLOURS = {
    "ink": "#1c2126",
    "muted": "#5c666e",
    "rule": "#dde1e4",
    "blue": "#0069a8",
    "orange": "#b84d00",
    "green": "#008a65",
    "purple": "#b5609a",
    "gold": "#a87400",
    "grey": "#7c868e",
}

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.parse_math": False,
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for a page's figures, whatever the user has set; as they were afterwards."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def inline_svg(figure: Any, name: str, title: str) -> str:
    """The figure as an <svg> element, as wide as there is room; its ids begin with `name`, which no other may have.

    Call it, as all drawing, within `style`.
    """
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # the same page for the same run
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, light in COLOURS.items():
        svg = svg.replace(light, f"var(--{colour})")
    opening = f'<svg role="img" aria-label="{escape(title, quote=True)}"'
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head).replace("<svg", opening)
    return head + ">" + re.sub(r"\s*\n\s*", "\n", body)
