"""The report's figures, drawn from the records of epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..weight_figures import QUANTILES
from .svg import COLOURS

WIDE, HALF = (7.4, 2.5), (3.6, 2.35)  # inches
MANY = 40
"""Points of a line from which on they are not marked one by one."""

LARGEST = 1e30
"""Losses of a run that went wrong can be near the end of what numbers there are, where axes overflow."""

PARTS = {"data": "grey", "teacher": "orange", "student": "blue", "influence": "purple", "evaluation": "green"}

Record = Mapping[str, Any]


def series(epochs: Sequence[Record], key: str) -> np.ndarray:
    """A number of every epoch; NaN where it is missing."""
    values = [record.get(key) for record in epochs]
    return np.array([value if isinstance(value, (int, float)) else math.nan for value in values], dtype=float)


def drawable(values: np.ndarray) -> np.ndarray:
    """The values, with NaN for what is not finite, or so large that an axis cannot hold it."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < LARGEST, values, math.nan)


def accuracy_figure(epochs: Sequence[Record]) -> Any | None:
    """Student and teacher, on validation and test data, over the epochs."""
    return _lines(
        epochs,
        {
            "student_accuracy": ("student, validation", "blue", "-"),
            "test_student_accuracy": ("student, test", "blue", (0, (2, 1.5))),
            "teacher_accuracy": ("teacher, validation", "orange", "-"),
            "test_teacher_accuracy": ("teacher, test", "orange", (0, (2, 1.5))),
        },
        "accuracy, %",
        WIDE,
        scale=100,
        legend_columns=4,
    )


def loss_figure(epochs: Sequence[Record]) -> Any | None:
    """The training losses over the epochs."""
    labels = {"student_loss": ("student", "blue", "-"), "teacher_loss": ("teacher", "orange", "-")}
    return _lines(epochs, labels, "training loss", HALF)


def detection_figure(epochs: Sequence[Record]) -> Any | None:
    """How well the weights tell flipped labels from clean ones, over the epochs."""
    labels: dict[str, tuple[str, str, Any]] = {
        "flip_auc": ("AUC", "ink", "-"),
        "flipped_below_1": ("flipped below 1", "orange", "-"),
        "clean_below_1": ("clean below 1", "blue", "-"),
    }
    return _lines(epochs, labels, "%", HALF, scale=100, limits=(-3, 103))


def band_figure(epochs: Sequence[Record]) -> Any | None:
    """Quantiles of the weights over the epochs: of all samples, or of clean and of flipped ones where that is known."""
    drawn = [record for record in epochs if quantiles(record, "all") is not None]
    if not drawn:
        return None
    knows_flips = all(quantiles(record, kind) is not None for record in drawn for kind in ("clean", "flipped"))
    kinds = {"clean": "blue", "flipped": "orange"} if knows_flips else {"all": "blue"}
    figure, axes = _axes(WIDE)
    at = series(drawn, "epoch")
    for kind, colour in kinds.items():
        low, quarter, median, three_quarters, high = np.array([quantiles(record, kind) for record in drawn]).T
        shade = {"color": COLOURS[colour], "linewidth": 0}
        if not knows_flips:
            axes.fill_between(at, low, high, alpha=0.15, label="5 to 95 %", **shade)
        what = "25 to 75 %" if kind == "all" else f"{kind}, 25 to 75 %"
        line = "median" if kind == "all" else f"{kind}, median"
        axes.fill_between(at, quarter, three_quarters, alpha=0.3, label=what, **shade)
        axes.plot(at, median, color=COLOURS[colour], marker=_marker(at), markersize=3, label=line)
    _line_at_1(axes.axhline)
    axes.set(xlabel="epoch", ylabel="weight w")
    _whole_epochs(axes, at)
    _legend(figure, axes, 4)
    return figure


def histogram_figure(chosen: Sequence[Record]) -> Any | None:
    """The weights' histogram at a few epochs, clean and flipped samples apart where that is known."""
    chosen = [record for record in chosen if _histogram(record, "all") is not None]
    if not chosen:
        return None
    figure, grid = _axes(WIDE, columns=len(chosen))
    edges = [_histogram(record, "all")[0] for record in chosen]  # type: ignore[index]
    for axes, record in zip(grid, chosen, strict=True):
        for kind, colour in (("clean", "blue"), ("flipped", "orange"), ("all", "blue")):
            found = _histogram(record, kind)
            if found is None or (kind == "all" and _histogram(record, "clean") is not None):
                continue
            shares = 100 * found[1] / max(found[1].sum(), 1)
            style = {"color": COLOURS[colour], "baseline": 0}
            axes.stairs(shares, found[0], fill=True, alpha=0.3, **style)
            axes.stairs(shares, found[0], label="all samples" if kind == "all" else f"{kind} labels", **style)
        _line_at_1(axes.axvline)
        axes.set_title(f"epoch {record['epoch']}")
        axes.set(xlabel="weight w", xlim=(min(e[0] for e in edges), max(e[-1] for e in edges)))
    grid[0].set_ylabel("% of these samples")
    _legend(figure, grid[0], 3)
    return figure


def time_figure(epochs: Sequence[Record]) -> Any | None:
    """Seconds of each part of an epoch, one on top of the other."""
    names = list(dict.fromkeys(name for record in epochs for name in record.get("seconds") or ()))
    if not names:
        return None
    figure, axes = _axes(WIDE)
    at = series(epochs, "epoch")
    base = np.zeros(len(at))
    spare = iter(["gold", "muted", "ink"] * len(names))
    for name in names:
        seconds = drawable(series([record.get("seconds") or {} for record in epochs], name))
        seconds = np.nan_to_num(seconds).clip(min=0)
        colour = COLOURS[PARTS.get(name) or next(spare)]
        # One path a part, however many epochs; after a gap in the epochs the next bar would be too wide.
        edges = np.append(at - 0.5, at[-1] + 0.5)
        axes.stairs(base + seconds, edges, baseline=base, fill=True, color=colour, label=name, linewidth=0)
        base = base + seconds
    axes.set(xlabel="epoch", ylabel="seconds", xlim=(edges[0], edges[-1]))
    axes.set_ylim(bottom=0)
    _whole_epochs(axes, at)
    _legend(figure, axes, 7)
    return figure


def quantiles(record: Record, kind: str) -> list[float] | None:
    """Those of QUANTILES of an epoch's weights: as recorded, or read from the histogram (right within its bins)."""
    recorded = (record.get("weight_quantiles") or {}).get(kind)
    if recorded is not None and len(recorded) == len(QUANTILES):
        return [float(value) for value in recorded]
    found = _histogram(record, kind)
    if found is None or not found[1].sum():
        return None
    edges, counts = found
    shares = np.concatenate([[0.0], counts.cumsum() / counts.sum()])
    # Of equal shares (empty bins) the last before the rise, and the first after it, are where the weights are.
    return [float(np.interp(share, shares + 1e-12 * np.arange(len(shares)), edges)) for share in QUANTILES]


def start_middle_end(epochs: Sequence[Record]) -> list[Record]:
    """The first epoch after which weights differ from each other, the last, and the one in the middle between them."""
    told = [record for record in epochs if _histogram(record, "all") is not None]
    apart = [record for record in told if (_histogram(record, "all")[1] > 0).sum() > 1]  # type: ignore[index]
    told = apart or told[-1:]
    chosen = [told[at] for at in sorted({0, (len(told) - 1) // 2, len(told) - 1})] if told else []
    return list(chosen)


def _histogram(record: Record, kind: str) -> tuple[np.ndarray, np.ndarray] | None:
    histogram = record.get("weight_histogram") or {}
    edges, counts = histogram.get("edges"), histogram.get(kind)
    if not edges or counts is None or len(edges) != len(counts) + 1:
        return None
    return np.array(edges, dtype=float), np.array(counts, dtype=float)


def _lines(
    epochs: Sequence[Record],
    labels: Mapping[str, tuple[str, str, Any]],
    what: str,
    size: tuple[float, float],
    *,
    scale: float = 1,
    limits: tuple[float, float] | None = None,
    legend_columns: int = 3,
) -> Any | None:
    """A line for each of the keys that has any finite number; None if none has."""
    at = series(epochs, "epoch")
    lines = {key: drawable(scale * series(epochs, key)) for key in labels}
    lines = {key: line for key, line in lines.items() if np.isfinite(line).any()}
    if not lines:
        return None
    figure, axes = _axes(size)
    for key, line in lines.items():
        label, colour, dashes = labels[key]
        axes.plot(at, line, label=label, color=COLOURS[colour], linestyle=dashes, marker=_marker(at), markersize=3)
    axes.set(xlabel="epoch", ylabel=what)
    if limits:
        axes.set_ylim(*limits)
    _whole_epochs(axes, at)
    _legend(figure, axes, legend_columns)
    return figure


def _axes(size: tuple[float, float], columns: int | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots() if columns is None else figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _marker(at: np.ndarray) -> str | None:
    return "o" if len(at) <= MANY else None


def _line_at_1(draw: Any) -> None:
    draw(1, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (4, 2)), zorder=3)


def _whole_epochs(axes: Any, at: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=[1, 2, 5, 10], min_n_ticks=1))
    if len(at) == 1:
        axes.set_xlim(at[0] - 0.5, at[0] + 0.5)


def _legend(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.1, columnspacing=1.4)
