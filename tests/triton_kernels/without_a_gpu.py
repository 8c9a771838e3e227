"""Runs and compiles Triton kernels where there is no GPU, each in the process it needs."""

import os
import re
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


def compile_for(script, arguments, folder):
    """What a script compiled, one line a kernel, and the bytes that each spills."""
    result = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    compiled = re.findall(r"^COMPILED .*$", result.stdout, re.MULTILINE)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stdout)]
    return compiled, spills
