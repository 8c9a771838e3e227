"""What the demo shows: a table, and files to look at."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .data import Digits
from .training import Outcome, Settings

ROWS = {
    "teacher": "test accuracy, teacher",
    "vanilla": "test accuracy, student, unweighted KD",
    "weighted": "test accuracy, student, weighted KD",
    "gain": "weighted minus unweighted",
    "auc": "area under ROC, low w finds flipped labels",
    "flipped_below_1": "share of flipped labels with w < 1",
    "clean_below_1": "share of clean labels with w < 1",
    "influence_seconds": "seconds in influence (one student)",
    "training_seconds": "seconds in training (teacher, two students)",
}


def measure(data: Digits, outcome: Outcome) -> dict[str, float]:
    """The figures of one seed, by the keys of ROWS."""
    from sklearn.metrics import roc_auc_score

    flipped, low = data.flipped, outcome.weights < 1
    figures = {
        **outcome.accuracy,
        "gain": outcome.accuracy["weighted"] - outcome.accuracy["vanilla"],
        "influence_seconds": outcome.influence_seconds,
        "training_seconds": outcome.training_seconds,
        "clean_below_1": low[~flipped].double().mean().item(),
    }
    if flipped.any():
        figures["auc"] = float(roc_auc_score(flipped.numpy(), -outcome.weights.numpy()))
        figures["flipped_below_1"] = low[flipped].double().mean().item()
    return figures


def table(figures: Sequence[dict[str, float]]) -> str:
    """Mean and standard deviation over the seeds."""
    width = max(map(len, ROWS.values()))
    lines = [f"{'':{width}}     mean      std   ({len(figures)} seeds)"]
    for key, label in ROWS.items():
        values = [f[key] for f in figures if key in f]
        if values:
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            lines.append(f"{label:{width}} {np.mean(values):8.4f} {spread:8.4f}")
    return "\n".join(lines)


def write_summary(path: Path, figures: Sequence[dict[str, float]], settings: Settings, flip: float) -> None:
    """All figures, seed by seed, and their means."""
    means = {key: float(np.mean([f[key] for f in figures])) for key in ROWS if all(key in f for f in figures)}
    content = {"flip": flip, "settings": settings._asdict(), "mean": means, "seeds": list(figures)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_weights(path: Path, data: Digits, outcome: Outcome) -> None:
    """One line a training image; phi as last measured, w as used in the last epoch."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "true_label", "flipped", "phi", "w"])
        columns: list[Tensor] = [data.train_y, data.true_y, data.flipped.long(), outcome.phi, outcome.weights]
        for index, (label, true, flipped, phi, w) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            writer.writerow([index, label, true, flipped, f"{phi:.6g}", f"{w:.6g}"])


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_weights(path: Path, data: Digits, outcome: Outcome) -> None:
    """Distribution of the weights of clean and of flipped samples (KD-AIF, figure 5)."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    bins = np.linspace(0, 2, 61)
    for mask, label, color in ((~data.flipped, "clean", "#3b75af"), (data.flipped, "flipped", "#d1495b")):
        share = 100 * np.ones(int(mask.sum())) / max(int(mask.sum()), 1)
        axes.hist(outcome.weights[mask].numpy(), bins, weights=share, alpha=0.65, label=f"{label} labels", color=color)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="weight w   (below 1: harmful)", ylabel="% of the samples", xlim=(0, 2))
    axes.set_title("What influence says of each training image")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_harmful(path: Path, data: Digits, outcome: Outcome, rows: int = 3, columns: int = 8) -> None:
    """The images of lowest weight, with the label they were given and the true one (KD-AIF, figure 1)."""
    plt = _pyplot()
    figure, grid = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.75 * rows), layout="constrained")
    for axes, index in zip(grid.flat, outcome.weights.argsort().tolist(), strict=False):
        axes.imshow(1 - data.train_x[index].view(8, 8).numpy(), cmap="gray", vmin=0, vmax=1)
        given, true = int(data.train_y[index]), int(data.true_y[index])
        color = "#d1495b" if given != true else "#3b75af"
        axes.set_title(f"given {given}, true {true}\nw = {outcome.weights[index]:.2f}", fontsize=8, color=color)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle("The most harmful training images (red: the label was flipped)", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
