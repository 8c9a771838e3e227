"""The CUDA sources on a machine without a GPU: they compile for every architecture, and no kernel spills registers."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None or not CSRC.exists(), reason="needs nvcc and the sources")

# Five sorts of loss, and two widths of loads; 64 registers let two blocks of 512 threads share a multiprocessor.
FAST = {
    "fast_warp_kernel": (15, 72),
    "fast_block_kernel": (5, 64),
    "fast_ring_kernel": (5, 92),
    "fast_wide_kernel": (10, 64),
    "fast_split_sums_kernel": (10, 64),
    "fast_split_terms_kernel": (10, 64),
}
# One softmax or two.
FAST_HVP = {
    "fast_warp_hvp_kernel": (4, 74),
    "fast_block_hvp_kernel": (4, 76),
    "fast_ring_hvp_kernel": (2, 82),
}
# By source: each kernel's instances, and the most registers that one of them takes (nvcc 13.0, sm_80 and sm_90; other
# compilers may want a few more). What decides how many warps a multiprocessor holds should not change unseen.
KERNELS = {
    "persample_dot.cu": {"persample_dot_kernel": (4, 128), "sum_of_sample_kernel": (4, 32)},
    "row_divergence.cu": {},  # finds the plan, and the file below
    "row_divergence_fast_bfloat16.cu": FAST,
    "row_divergence_fast_float16.cu": FAST,
    "row_divergence_fast_float32.cu": FAST,
    "row_divergence_fast_hvp_bfloat16.cu": FAST_HVP,
    "row_divergence_fast_hvp_float16.cu": FAST_HVP,
    "row_divergence_fast_hvp_float32.cu": FAST_HVP,
    "row_divergence_general_float32.cu": {"row_divergence_kernel": (11, 80)},  # 11 kinds
    "row_divergence_general_float64.cu": {"row_divergence_kernel": (11, 132)},
    "row_divergence_general_hvp_float32.cu": {"row_divergence_hvp_kernel": (11, 117)},
    "row_divergence_general_hvp_float64.cu": {"row_divergence_hvp_kernel": (11, 168)},
    "row_stats.cu": {"row_stats_kernel": (4, 50), "row_stats_of_both_kernel": (4, 94)},  # 32 and 59 in float32
}


def compiled(source, architecture, tmp_path):
    """What ptxas says of each kernel: (name, bytes spilled, registers)."""
    include = Path(torch.__file__).parent / "include"
    command = [NVCC, "-std=c++20", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-I", str(CSRC)]
    command += ["-isystem", str(include), "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [str(CSRC / "cuda" / source), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pattern = (
        r"Function properties for _ZN5kdaif\d+(\w+?_kernel)I\w+\n"
        r".* (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    found = re.findall(pattern, result.stderr)
    return [(name, int(stores) + int(loads), int(registers)) for name, stores, loads, registers in found]


@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("cuda/*.cu")))
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_without_spilling(source, architecture, tmp_path):
    kernels = compiled(source, architecture, tmp_path)
    assert Counter(name for name, _, _ in kernels) == {name: count for name, (count, _) in KERNELS[source].items()}
    assert [kernel for kernel in kernels if kernel[1]] == []
    assert [kernel for kernel in kernels if kernel[2] > KERNELS[source][kernel[0]][1] + 8] == []
