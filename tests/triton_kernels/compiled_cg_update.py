"""Compiles cg_update's Triton kernels for a GPU that is not here: run by test_cg_update.py, on its own.

python compiled_cg_update.py COMPUTE_CAPABILITY
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdaif_fast.triton_kernels import cg_update as module
from tests.triton_kernels.compiled_persample import _Compiled
from tests.triton_kernels.compiled_row_divergence import _Driver

if __name__ == "__main__":
    driver.set_active(_Driver(GPUTarget("cuda", int(sys.argv[1]), 32)))
    for name in ("_cg_update_kernel", "_cg_dots_kernel"):
        setattr(module, name, _Compiled(getattr(module, name), [{}]))
    for K, P in ((1, 17_000), (8, 17_226), (3, 17)):
        x, r, p, Ap, best = torch.zeros(5, K, P).unbind()
        module.cg_update(x, r, p, Ap, torch.zeros(K), 0.1)
        module.cg_update(x, r, p, Ap, torch.zeros(K), 0.1, best, torch.zeros(K, dtype=torch.bool))
        module.cg_dots(p, Ap)
