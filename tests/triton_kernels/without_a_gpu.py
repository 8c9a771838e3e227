"""Runs Triton kernels where there is no GPU, in the process that they need."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_under_the_interpreter(tests):
    """Triton reads TRITON_INTERPRET when it is imported, so these tests run in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
