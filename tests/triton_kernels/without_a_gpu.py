"""Runs Triton kernels where there is no GPU, in the process that they need."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _run(*arguments):
    """Triton reads TRITON_INTERPRET when it is imported, so what is interpreted runs in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def obstacle():
    """Why this Triton's interpreter cannot run even a few lines that are not ours; None if it can."""
    result = _run(HERE / "interpreted_probe.py")
    return (result.stderr.strip().splitlines() or ["no message"])[-1] if result.returncode else None


def run_under_the_interpreter(tests):
    """Skipped only where the interpreter itself does not work with the numpy that is there."""
    if obstacle() is not None:
        pytest.skip(f"Triton's interpreter does not work here: {obstacle()}")
    result = _run("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / tests)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
