"""Compiles the kernels that sum products in one pass for a GPU that is not here: run by their tests, on its own.

python compiled_persample_sums.py COMPUTE_CAPABILITY persample_layer_norm|persample_group_norm|persample_inner
"""

import importlib
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdaif_fast.triton_kernels import affine_sums, persample_inner
from tests.triton_kernels.compiled_persample import DTYPES, _Compiled
from tests.triton_kernels.compiled_row_divergence import _Driver

# Vectors of 16 bytes, of a few elements, none; one position; parts; channels last
LAYERS = ((8, 512, 768), (4, 70, 1001), (300, 1, 512), (1, 1, 1), (2, 9000, 20))  # N, T, D
GROUPS = (
    (8, 64, 3136, 32),
    (8, 256, 196, 32),
    (8, 512, 49, 32),
    (1, 8, 50_000, 2),
    (4, 33, 1, 3),
    (1, 1, 1, 1),
)  # N, C, L, groups
IMAGES = ((8, 1, 64, 3136), (8, 3, 256, 196), (8, 1, 33, 49), (300, 1, 10, 1), (1, 1, 1, 1))  # N, K, C, L


def channels_last(x):
    """The same, with channels side by side."""
    return x.mT.contiguous().mT


def layer_norms(dtype):
    """Layer and RMS norms."""
    for N, T, D in LAYERS:
        x = torch.zeros(N, T, D, dtype=dtype)
        yield x, x, torch.zeros(N, T), torch.zeros(N, T)
    yield x, x, None, torch.zeros(1, 1).expand(N, T)


def group_norms(dtype):
    """Group norms in both memory formats."""
    for N, C, L, groups in GROUPS:
        x, statistic = torch.zeros(N, C, L, dtype=dtype), torch.zeros(N, groups)
        yield x, x, statistic, statistic
        yield channels_last(x), channels_last(x), statistic, statistic
    x = torch.zeros(8, 64, 784, dtype=dtype)
    yield x, channels_last(x), torch.zeros(8, 32), torch.zeros(8, 32)


def inner_products(dtype):
    """Of both memory formats with both."""
    for N, K, C, L in IMAGES:
        z, b = torch.zeros(N, K, C, L, dtype=dtype), torch.zeros(N, C, L, dtype=dtype)
        for left in (z, channels_last(z)):
            for right in (b, channels_last(b)):
                yield left, right


CASES = {"persample_layer_norm": layer_norms, "persample_group_norm": group_norms, "persample_inner": inner_products}

if __name__ == "__main__":
    driver.set_active(_Driver(GPUTarget("cuda", int(sys.argv[1]), 32)))
    for module, name in ((affine_sums, "_affine_sums_kernel"), (persample_inner, "_inner_kernel")):
        setattr(module, name, _Compiled(getattr(module, name), [{}]))
    launcher = getattr(importlib.import_module(f"kdaif_fast.triton_kernels.{sys.argv[2]}"), sys.argv[2])
    for dtype in DTYPES:
        for arguments in CASES[sys.argv[2]](dtype):
            launcher(*arguments)
