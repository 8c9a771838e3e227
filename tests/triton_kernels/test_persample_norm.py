"""The Triton kernels of persample_norm without a GPU: run by Triton's interpreter, and compiled for GPUs."""

import pytest

from .without_a_gpu import compile_for, run_under_the_interpreter

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_under_the_interpreter("interpreted_persample_norm.py")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spilling(capability, tmp_path):
    """Every configuration that may be chosen, in every dtype, to machine code."""
    compiled, spills = compile_for("compiled_persample.py", (capability, "persample_norm"), tmp_path)
    assert len(compiled) >= 15
    assert len(spills) >= 15
    assert not any(spills)
    on_tensor_cores = "mma.sync" if capability == 80 else "wgmma"
    assert any(on_tensor_cores in line for line in compiled if "bfloat16" in line)
    assert not any("mma" in line for line in compiled if "float32" in line and "ieee" in line)
    if capability == 90:  # the main loop has nothing in it but the product, and copies for the next ones
        fed = [line for line in compiled if "bfloat16" in line and "gram" in line and "EVEN_OUTPUTS': 256" in line]
        assert fed
        for line in fed:
            assert all(way in line for way in ("both-from-shared", "asynchronous", "loaded-ahead")), line
