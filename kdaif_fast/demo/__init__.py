"""`kdaif-fast demo`: distillation on real digits with wrong labels, unweighted and weighted by influence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from .._progress import bar
from . import report
from .data import load_digits
from .training import Settings, train


def require_packages() -> None:
    """Raise ImportError before any work is done."""
    missing = [name for name in ("sklearn", "matplotlib") if not _can_import(name)]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install scikit-learn matplotlib")


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def run_demo(
    out: Path,
    seeds: int = 8,
    flip: float = 0.2,
    settings: Settings | None = None,
    progress: bool | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, float]]:
    """Run the demo and write weights.csv, weights.png, harmful.png (first seed) and summary.json (all) to `out`.

    Args:
        out: folder for the results; made if it is not there.
        seeds: how many times to repeat, with another split, other flips and other parameters.
        flip: share of training labels to make wrong, from 0 to 0.9.
        settings: of the training.
        progress: show a progress bar; None shows it on a terminal only.
        say: where the table goes.

    Returns:
        The figures of each seed.

    Raises:
        ValueError: seeds below 1 or a flip outside [0, 0.9].
        ImportError: scikit-learn or matplotlib are missing.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    if not 0 <= flip <= 0.9:
        raise ValueError(f"flip is {flip}, expected a share from 0 to 0.9")
    require_packages()
    settings = settings or Settings()
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    with bar(progress, total=seeds * settings.epochs, unit="epoch") as shown:
        for seed in range(seeds):
            shown.set_description(f"seed {seed + 1} of {seeds}")
            data = load_digits(flip, seed)
            outcome = train(data, settings, seed, on_epoch=shown.update)
            figures.append(report.measure(data, outcome))
            if seed == 0:
                report.write_weights(out / "weights.csv", data, outcome)
                report.draw_weights(out / "weights.png", data, outcome)
                report.draw_harmful(out / "harmful.png", data, outcome)
    report.write_summary(out / "summary.json", figures, settings, flip)
    say(f"\n{round(flip * len(data.train_y))} of {len(data.train_y)} training labels flipped\n")
    say(report.table(figures))
    say(f"\nwritten to {out}: weights.csv, weights.png, harmful.png, summary.json")
    return figures
