"""Peak memory of curvature products with many vectors, beyond the linearisation and the products themselves.

`python benchmarks/hvp_memory.py conv hessian 16 64` prints the peak in MiB with 16 vectors and a budget of 64 MiB;
with `together` at the end, the budget alone says how many vectors are under way at a time, as on a GPU.
"""

from __future__ import annotations

import sys

import torch
from peak_memory import peak_mib, run_in_a_process
from persample_models import make

from kdaif_fast.batched import backward
from kdaif_fast.curvature import make_curvature


def peak(model_name: str, curvature: str, count: int, budget: float, together: str = "") -> float:
    """MiB above model, batch, the graph that is kept and the vectors, less the products that are returned."""
    torch.set_num_threads(1)
    if together:
        backward.CACHED = 1 << 40
    model, batch = make(model_name)
    operator = make_curvature(curvature, model, batch, memory=round(budget * 2**20))
    vectors = torch.randn(count, operator.size)
    products = vectors.numel() * vectors.element_size() / 2**20
    return peak_mib(lambda: operator.matmat(vectors)) - products


def peak_of_a_process(model_name: str, curvature: str, count: int, budget: float, *together: str) -> float:
    """The same, in a process of its own."""
    return run_in_a_process(__file__, model_name, curvature, str(count), str(budget), *together)


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:]))
