"""The script for compute-sanitizer runs by itself, and says what it did."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "sanitized.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_runs():
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 wrong" in result.stdout


def test_nothing_to_run_is_a_failure():
    result = run("--only", "no such case")
    assert result.returncode == 1
    assert "0 cases" in result.stdout
