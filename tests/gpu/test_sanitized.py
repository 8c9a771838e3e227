"""The script for compute-sanitizer runs by itself, and says what it did."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "sanitized.py"


def test_runs():
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 wrong" in result.stdout
