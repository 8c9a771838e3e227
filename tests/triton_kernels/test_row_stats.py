"""The Triton kernel of row_stats without a GPU: run by the interpreter, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED_TESTS = Path(__file__).with_name("interpreted_row_stats.py")


def test_under_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, so these tests run in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED_TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kdaif_fast.triton_kernels.row_stats import _row_stats_kernel, block_for

for element, classes in itertools.product(("fp32", "bf16", "fp16"), (100, 1000, 32000)):
    block, warps = block_for(classes)
    types = {"V": "i32", "temperature": "fp32", "labels": "*i64", "stats": "*fp32", "argmax": "*i64"}
    types |= {"student": f"*{element}", "teacher": f"*{element}", "student_stride": "i64", "teacher_stride": "i64"}
    types |= dict.fromkeys(("first_class", "last_class", "ignore_index"), "i32")
    for teacher in (True, False):
        constants = {"TEACHER": teacher, "LABELS": True, "MASS": True, "BLOCK": block}
        signature = {name: types.get(name, "constexpr") for name in _row_stats_kernel.arg_names}
        source = ASTSource(fn=_row_stats_kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options={"num_warps": warps})
        assert compiled.metadata.shared <= 48 * 1024
        print("COMPILED", flush=True)
"""


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_without_spilling(architecture, tmp_path):
    """Every dtype and block width, to machine code; a register spill would cost more than all else."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("ARCHITECTURE", str(architecture))],
        env={
            **os.environ,
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    output = result.stdout + result.stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    assert output.count("COMPILED") == 3 * 3 * 2
    assert len(spills) >= 2 * output.count("COMPILED")  # stores and loads of each
    assert not any(spills)
