"""`kdaif-fast report`: one HTML page about a run, for people to look at."""

from __future__ import annotations

import os
from pathlib import Path

from ...._files import write_whole
from ..run_log import read_log

PAGE = "report.html"

__all__ = ["report"]


def report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html into a run's folder: one file that needs no other, to read in a browser or to print.

    It has the key figures; accuracies and weights over the epochs; the most harmful and most helpful samples; the
    weights by class and group; time and refreshes; and the run's settings, from run.json where there is one. A run that
    was killed, or still goes on, has what is known so far.

    Args:
        run_dir: the folder, with a log.jsonl at least.

    Returns:
        The page's path; what was there before is replaced.

    Raises:
        FileNotFoundError: run_dir is no folder of a run.
        ValueError: a file there is not what a run writes.
        ImportError: jinja2, matplotlib or safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from kdaif_fast.distill.runs.run_log import RunLog
        >>> folder = tempfile.TemporaryDirectory()
        >>> RunLog(folder.name).write({"kind": "epoch", "epoch": 1, "step": 20, "student_accuracy": 0.91})
        >>> "91.0" in report(folder.name).read_text(encoding="utf-8")
        True
        >>> folder.cleanup()
    """
    folder = Path(run_dir)
    records = read_log(folder)
    from .page import page

    path = folder / PAGE
    write_whole(path, page(folder, records).encode("utf-8", "replace"))
    return path
