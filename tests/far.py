"""Tensors whose neighbours lie so far apart that 32 bits count neither their elements nor their bytes."""

import math
import mmap

import pytest
import torch

APART = 2**31 + 16  # elements; a multiple of what a load brings
AROUND = 1024  # elements before and after, which nobody must touch


def far(x, dimension=0):
    """The same numbers, neighbours along a dimension far apart; around them is NaN, or -1.

    What lies between them is never touched, so takes no memory.
    """
    x = x.transpose(0, dimension)
    row = x[0].numel()
    size = (x.shape[0] - 1) * APART + row + 2 * AROUND
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, size * x.element_size(), flags=flags)
    except OSError:
        pytest.skip("no address space for rows so far apart")
    flat = torch.frombuffer(memory, dtype=x.dtype)
    around = flat.as_strided((x.shape[0], row + 2 * AROUND), (APART, 1))
    around.fill_(math.nan if x.is_floating_point() else -1)
    view = flat.as_strided(x.shape, (APART, *x[0].contiguous().stride()), AROUND)
    view.copy_(x)
    return view.transpose(0, dimension)
