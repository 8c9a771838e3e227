"""Notes anew how many registers each kernel takes: python -m tests.registers [cuda] [triton]."""

import concurrent.futures
import re
import subprocess
import sys

from tests import registers
from tests.registers import cuda


def note_cuda():
    """The CUDA kernels, for every architecture."""
    version = subprocess.run([cuda.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    uses = [use for architecture in cuda.ARCHITECTURES for use in cuda.uses(architecture)]
    return registers.write("cuda", registers.of_cuda(uses), f"nvcc {re.search('release ([0-9.]+)', version)[1]}")


def note_triton():
    """What the quick tests compile of the Triton kernels: each architecture in a process of its own."""
    import triton

    from tests.triton_kernels.compiling import OPS, compiled

    jobs = [(90, "quick", op) for op in OPS] + [(80, "few", op) for op in OPS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: [(job[0], b) for b in compiled(*job)], jobs))
    found = registers.gathered(
        (b["kernel"], f"{b['dtype']} {b['block']}", capability, b["registers"])
        for report in reports
        for capability, b in report
    )
    version = ".".join(triton.__version__.split(".")[:2])
    return registers.write(f"triton-{version}", found, f"Triton {triton.__version__}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("cuda", "triton"):
        changes = {"cuda": note_cuda, "triton": note_triton}[name]()
        print(f"{name}: {len(changes)} changes", *changes, sep="\n  ")
