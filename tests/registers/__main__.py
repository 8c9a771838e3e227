"""Notes anew how many registers each kernel takes: python -m tests.registers [cuda] [triton] [--op OP]."""

import argparse
import concurrent.futures
import re
import subprocess

from tests import registers
from tests.registers import cuda


def note_cuda():
    """The CUDA kernels, for every architecture."""
    version = subprocess.run([cuda.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    uses = [use for architecture in cuda.ARCHITECTURES for use in cuda.uses(architecture)]
    return registers.write("cuda", registers.of_cuda(uses), f"nvcc {re.search('release ([0-9.]+)', version)[1]}")


def note_triton(ops):
    """What the quick tests compile of the Triton kernels: each op and architecture in a process of its own."""
    import triton

    from tests.triton_kernels.compiling import OPS, compiled, recorded

    ops = ops or OPS
    jobs = [(90, "quick", op) for op in ops] + [(80, "few", op) for op in ops]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: compiled(*job), jobs))
    name = f"triton-{'.'.join(triton.__version__.split('.')[:2])}"
    anew = {kernel for kernel, _, _ in recorded("quick", *ops)}
    kept = {kernel: noted for kernel, noted in (registers.table(name) or {}).items() if kernel not in anew}
    if ops == OPS:
        kept = {}  # kernels that are no more
    found = registers.of_triton([b for report in reports for b in report])
    return registers.write(name, kept | found, f"Triton {triton.__version__}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.registers", description=__doc__)
    parser.add_argument("of", nargs="*", metavar="cuda|triton", help="both if neither is named")
    parser.add_argument("--op", action="append", default=[], help="only this op of Triton; may be given several times")
    asked = parser.parse_args()
    for name in asked.of or ["cuda", "triton"]:
        changes = {"cuda": note_cuda, "triton": lambda: note_triton(asked.op)}[name]()
        print(f"{name}: {len(changes)} changes", *changes, sep="\n  ")
