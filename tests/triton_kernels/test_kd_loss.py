"""The Triton kernels of kd_loss without a GPU: run by Triton's interpreter, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED_TESTS = Path(__file__).with_name("interpreted_kd_loss.py")


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
import itertools, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kdaif_fast.triton_kernels.kd_loss import _kd_loss_hvp_kernel, _kd_loss_kernel, block_for

def build(kernel, types, constants, warps):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 48 * 1024
    print("COMPILED", kernel.__name__, flush=True)

for element, classes in itertools.product(("fp32", "bf16", "fp16"), (1000, 32000)):
    block, warps = block_for(classes)
    scalars = {"V": "i32", "temperature": "fp32", "alpha": "fp32", "scale": "*fp32", "student_stride": "i64"}
    logits = {name: f"*{element}" for name in ("student", "teacher", "tangent", "grad", "out")}
    loss_types = {**scalars, **logits, "labels": "*i64", "loss": "*fp32", "teacher_stride": "i64"}
    hvp_types = {**scalars, **logits, "tangent_stride": "i64"}
    for parts in ({"CE": True, "KL": True},) if element != "fp32" else (
        {"CE": True, "KL": True}, {"CE": True, "KL": False}, {"CE": False, "KL": True}
    ):
        build(_kd_loss_kernel, loss_types, {**parts, "LOSS": True, "GRAD": True, "BLOCK": block}, warps)
    build(_kd_loss_hvp_kernel, hvp_types, {"CE": True, "KL": True, "BLOCK": block}, warps)
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
    assert output.count("COMPILED") == 2 * (4 + 2 + 2)
    assert len(spills) >= 2 * output.count("COMPILED")  # stores and loads of each
    assert not any(spills)


def test_state_says_why_it_is_off(monkeypatch):
    from kdaif_fast import _library

    monkeypatch.delenv("KDAIF_NATIVE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in _library._triton_state()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _library._triton_state() == "loaded"
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    assert _library._triton_state() == "not installed"
