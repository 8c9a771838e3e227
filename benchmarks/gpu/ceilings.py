"""The ceilings that shares are of, measured first in the same run: copies, and matrix products of random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .timing import Call, Timer


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 on the matrix units, or in full, which torch does to products alone."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _copy(elements: int, device: str) -> Call:
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    return lambda: target.copy_(source)


def _product(side: int, dtype: torch.dtype, device: str) -> Call:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def ceilings(timer: Timer, tiny: bool) -> dict[str, float]:
    """copy: bytes a second, read and written counted both; bf16, tf32, float32: operations a second.

    Memory: 8 GiB on a GPU.
    """
    device = timer.device
    elements = 2**16 if tiny else 2**30
    found = {"copy": 2 * 4 * elements / timer.time([_copy(elements, device)]).seconds}
    side = 64 if tiny else 8192
    for name, dtype, allowed in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        with tf32(allowed):
            found[name] = 2 * side**3 / timer.time([_product(side, dtype, device)]).seconds
    return found
