"""Every CUDA kernel of the library once, at awkward small sizes and in every dtype: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck|racecheck|initcheck python tests/gpu/sanitized.py [--only WORD]

Without pytest, as each process under the sanitizer takes long to start. Results are compared with the definitions in
float64, so that a run also says whether the numbers are right. Without a GPU the CPU's kernels are rehearsed.

Fresh memory of torch's is one block that its allocator cuts up, in which the sanitizer sees no ends: set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, as this script does, and each tensor is an allocation of its own.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import kdaif_fast
from kdaif_fast.reference import row_divergence as row_reference
from tests.gpu.calls import (
    CALLS,
    COMPILED,
    KERNELS,
    NARROW,
    TOLERANCE,
    backends_of,
    dtypes_of,
    error,
    expected,
    on,
    widened,
)

# Row kernels by width: a warp's, a block's, and several blocks'; odd ones, which no vector divides, and whole ones.
WIDTHS = (1, 33, 1000, 4099, 40_003)


def row_arguments(V, dtype, N=3):
    """The ops' arguments for the usual loss, as kd_loss gives them."""
    student, teacher = (2 * torch.randn(2, N, V)).to(dtype).unbind()
    labels = torch.randint(V, (N,))
    labels[0] = -100
    rest = [None, None, None, torch.rand(N), None]
    return [student, teacher, None, None, labels, *rest], [
        [2.0, 0.3, 2.8, 0, 0, 1, 0, 0, 0.5],
        [0, 0, 0, 0, 0, -1, -100],
    ]


def rows(device, V, dtype):
    """Values, gradients and products of one width: the largest relative error."""
    tensors, settings = row_arguments(V, dtype)
    there = [x if x is None else x.to(device) for x in tensors] + settings
    wide = [x if x is None else widened([x])[0] for x in tensors] + settings
    ops = torch.ops.kdaif_fast
    tangents = torch.randn(2, 3, V).to(dtype)
    ours = (
        *ops.row_divergence_with_grad(*there),
        ops.row_divergence(*there),
        ops.row_divergence_grad(*there),
        ops.row_divergence_hvp(tangents.to(device), False, *there),
    )
    loss, grad = row_reference.row_divergence_with_grad(*wide)
    product = row_reference.row_divergence_hvp(tangents.double(), False, *wide)
    return error(ours, (loss, grad, loss, grad, product))


def cases(device):
    """(name, dtype, a function that gives the error) of everything."""
    for backend in backends_of(device):
        if backend == "reference":
            continue
        for name in KERNELS:
            for dtype in dtypes_of(name):
                # Compiling for Triton takes seconds a kernel: one dtype each. What has no compiled kernel is Triton's.
                if backend == "triton" and dtype != (NARROW[0] if NARROW[0] in dtypes_of(name) else torch.float32):
                    continue
                if backend == "cuda" and name not in COMPILED:
                    continue

                def run(name=name, dtype=dtype):
                    tensors = on(device, CALLS[name].make(dtype))
                    return error(CALLS[name].run(*tensors), expected(CALLS[name], tensors))

                yield backend, name, dtype, run
        for V in WIDTHS if backend != "triton" else WIDTHS[3:4]:
            for dtype in (torch.float32, torch.bfloat16) if backend != "triton" else (torch.bfloat16,):
                yield backend, f"rows of {V}", dtype, lambda V=V, dtype=dtype: rows(device, V, dtype)


def main(arguments=None):
    """1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a word that a case's name, backend or dtype has in it")
    only = parser.parse_args(arguments).only
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # First configurations, so that nothing is run hundreds of times to be timed; and memory is not filled: initcheck.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    count, wrong, start = 0, [], time.perf_counter()
    for backend, name, dtype, run in cases(device):
        label = f"{name}, {str(dtype).removeprefix('torch.')}, {backend}"
        if only not in label:
            continue
        with kdaif_fast.backend(backend):
            found = run()
        count += 1
        if not found <= TOLERANCE[dtype]:
            wrong.append(f"{label}: off by {found:.1e}, expected at most {TOLERANCE[dtype]:.1e}")
    print(f"{count} cases on {device} in {time.perf_counter() - start:.1f} s, {len(wrong)} wrong")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
