"""The CUDA sources on a machine without a GPU: they compile for every architecture, and no kernel spills registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")

KERNELS = {
    "kd_loss.cu": 8,  # loss and Hessian-vector product, four dtypes
    "row_stats.cu": 8,  # with and without a teacher, four dtypes
}

pytestmark = pytest.mark.skipif(NVCC is None or not CSRC.exists(), reason="needs nvcc and the sources")


@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("cuda/*.cu")))
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_without_spilling(source, architecture, tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = [NVCC, "-std=c++20", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-I", str(CSRC)]
    command += ["-isystem", str(include), "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [str(CSRC / "cuda" / source), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '\w+_kernel", result.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(kernels) == KERNELS[source]
    assert len(spills) == len(kernels)
    assert all(pair == ("0", "0") for pair in spills)
