"""Compiles an op's Triton kernels for a GPU that is not here: run by the tests of the per-sample ops, on its own.

    python compiled_persample.py COMPUTE_CAPABILITY persample_dot|persample_norm|persample_grad|weighted_grad

It goes through the launchers, with a driver that compiles and does not launch, and says what it compiled.
"""

import importlib
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdaif_fast.triton_kernels import persample_tiles
from tests.triton_kernels.compiled_row_divergence import _Driver

MOST_SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # of a block; 99 KB on the smallest that have bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {  # [N, T, I], O, K: one position, several, sizes that no vector divides, and layers of a few features
    "persample_dot": (
        ((300, 1, 784), 512, 1),
        ((32, 512, 768), 1024, 1),
        ((128, 512, 784), 1000, 1),
        ((128, 512, 784), 1024, 1),
        ((300, 7, 1001), 999, 2),
        ((4, 7, 10), 3, 2),
    ),
    "persample_norm": (
        ((300, 1, 784), 512, 1),
        ((4, 64, 768), 768, 1),
        ((4, 512, 784), 768, 1),
        ((4, 1024, 256), 512, 1),
        ((4, 65, 9999), 1001, 1),
        ((4, 101, 1001), 999, 1),
        ((4, 5, 10), 3, 1),
    ),
    "persample_grad": (
        ((300, 1, 784), 512, 1),
        ((32, 64, 768), 768, 1),
        ((32, 197, 784), 1000, 1),
        ((4, 67, 1001), 999, 1),
        ((4, 7, 10), 3, 1),
    ),
    "weighted_grad": (
        ((300, 1, 784), 512, 1),
        ((4, 64, 768), 768, 1),
        ((64, 197, 784), 2000, 1),
        ((4, 67, 1001), 999, 1),
        ((4, 7, 10), 3, 1),
    ),
}


def ways(compiled):
    """How a Hopper's matrix units are fed, if they are."""
    products = re.findall(r"warp_group_dot %.*", compiled.asm["ttgir"])
    if not products:
        return []
    found = {
        "both-from-shared": all(re.search(r": !ttg.memdesc<.*> \* !ttg.memdesc<", line) for line in products),
        "asynchronous": all("isAsync = true" in line for line in products)
        and bool(re.search(r"warp_group_dot_wait .*pendings = 1", compiled.asm["ttgir"])),
        "loaded-ahead": "async_copy_global_to_local" in compiled.asm["ttgir"],
    }
    return [way for way, is_so in found.items() if is_so]


class _Compiled:
    """In place of a tuned kernel: compiles all of its configurations for the arguments of a launch."""

    def __init__(self, kernel, configurations):
        self.kernel, self.configurations = kernel, configurations

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **named):
        for configuration in self.configurations:
            wanted = configuration if isinstance(configuration, dict) else configuration.all_kwargs()
            compiled = self.kernel.warmup(*args, grid=(1,), **named, **wanted)
            assert compiled.metadata.shared <= MOST_SHARED_MEMORY[compiled.metadata.target.arch], (
                wanted,
                compiled.metadata.shared,
            )
            settings = {k: v for k, v in (named | wanted).items() if isinstance(v, (int, str)) and k != "maxnreg"}
            instructions = [word for word in ("wgmma", "mma.sync") if word in compiled.asm["ptx"]] + ways(compiled)
            print(
                f"COMPILED {self.kernel.__name__} {args[0].dtype} {settings} {compiled.metadata.shared} {instructions}",
                file=sys.stderr,
                flush=True,
            )


def compile_in_place_of_launches(module):
    """Every launch of a module's kernels compiles instead."""
    tuned = persample_tiles.tuned

    def compiled_instead(kernel, *settings):
        return _Compiled(kernel, tuned(kernel, *settings).configs)

    for name in ("_one_position_kernel", "_outer_product_kernel"):  # those that are not tuned
        if hasattr(module, name):
            setattr(module, name, _Compiled(getattr(module, name), [{}]))
    module.tuned = compiled_instead


def run(capability, op):
    """Compile every configuration of an op, in every dtype, for a GPU of this compute capability."""
    driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))
    module = importlib.import_module(f"kdaif_fast.triton_kernels.{op}")
    compile_in_place_of_launches(module)
    for sizes, dtype in ((sizes, dtype) for sizes in SIZES[op] for dtype in DTYPES):
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
            compile_op(module, op, dtype, *sizes)


def compile_op(module, op, dtype, shape, outputs, K):
    """One call of the launcher."""
    N, T, features = shape
    a, b = torch.zeros(N, T, features, dtype=dtype), torch.zeros(N, T, outputs, dtype=dtype)
    more = {"persample_dot": [torch.zeros(K, outputs, features, dtype=dtype)], "weighted_grad": [torch.zeros(N)]}
    getattr(module, op)(a, b, *more.get(op, []))


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
