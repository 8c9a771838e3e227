"""The Triton kernels of cg_update without a GPU: run by Triton's interpreter, and compiled for GPUs."""

import pytest

from .without_a_gpu import compile_for, run_under_the_interpreter

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_under_the_interpreter("interpreted_cg_update.py")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spilling(capability, tmp_path):
    compiled, spills = compile_for("compiled_cg_update.py", (capability,), tmp_path)
    assert len(compiled) == 9
    assert len(spills) >= 6  # fewer where sizes have the same divisibility, and hence one binary
    assert not any(spills)
