"""The Triton kernels of row_divergence without a GPU: run by Triton's interpreter, and compiled for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_under_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, so these tests run in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_row_divergence.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def compile_for(capability, cases, folder):
    """What was compiled, one line a kernel, and the bytes that each of them spills."""
    result = subprocess.run(
        [sys.executable, str(HERE / "compiled_row_divergence.py"), str(capability), cases],
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


@pytest.mark.parametrize(
    ("capability", "cases", "fewest"),
    [(80, "main", 30), (90, "main", 30), (90, "kinds", 30)]
    + [pytest.param(capability, "all", 1000, marks=pytest.mark.slow) for capability in (80, 90)],
)
def test_compiles_without_spilling(capability, cases, fewest, tmp_path):
    """Every configuration that may be chosen, to machine code; a register spill would cost more than all else."""
    compiled, spills = compile_for(capability, cases, tmp_path)
    assert len(compiled) >= fewest
    assert len(spills) >= fewest  # stores and loads of each that was not the same as one before
    assert not any(spills)
    if cases == "main":
        # Student, teacher or tangent, label, and the student's logit at the label: rows of one block are read once.
        plain = [line for line in compiled if "'BLOCK': 1024, 'ONE_BLOCK': True" in line]
        assert {re.search(r"(\w+) loads=(\d+)", line).groups() for line in plain} == {
            ("row_divergence_kernel", "4"),
            ("row_divergence_hvp_kernel", "3"),
        }


def test_candidates():
    from kdaif_fast.triton_kernels.row_divergence import WIDEST_BLOCK, candidates

    for V in (1, 31, 32, 1000, 4096, 4097, 200_000):
        for tile in (1, 2, 4):
            for block, warps in candidates(V, tile):
                assert block & (block - 1) == 0
                assert block * tile <= WIDEST_BLOCK
                assert block * tile <= 256 * warps or warps == 1
            assert len(candidates(V, tile)) == 1 or WIDEST_BLOCK // tile < V
