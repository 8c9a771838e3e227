"""Inputs for the kernels of per-sample gradients, and what the definitions say of them in float64."""

import importlib

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [N, T, I], O: one position, several (fewer and more than a block's), features that no block divides, and ones
SHAPES = (((37, 1, 40), 33), ((3, 7, 20), 50), ((2, 70, 33), 10), ((2, 34, 65), 40), ((1, 1, 1), 1), ((3, 2, 1), 5))


def inputs(shape, outputs, dtype, seed=0):
    """Layer inputs [N, T, I] and output gradients [N, T, O]."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator)
    b = torch.randn(*shape[:2], outputs, generator=generator)
    return a.to(dtype), b.to(dtype)


def directions(count, outputs, features, dtype, seed=1):
    """[K, O, I]."""
    return torch.randn(count, outputs, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(count):
    """[N], some of them 0."""
    return 2 * torch.rand(count, generator=torch.Generator().manual_seed(2)) * (torch.arange(count) % 3 != 1)


def expected(op, *tensors):
    """The definition in float64."""
    definition = getattr(importlib.import_module(f"kdaif_fast.reference.{op}"), op)
    return definition(*(x.double() for x in tensors))


def assert_close(ours, wanted, rounding=2e-6):
    """Within the rounding of a sum, relative to the largest: single results may cancel."""
    assert ours.shape == wanted.shape
    if wanted.numel():
        error = (ours.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        assert error <= rounding, f"off by {error:.1e} of the largest, expected at most {rounding:.1e}"


def rounding_of(dtype):
    """What rounding a result to a type may cost; the interpreter truncates to bfloat16."""
    return {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


def strided(x):
    """The same numbers, transposed in memory and with gaps."""
    wide = torch.full((*x.shape[:-3], 2 * x.shape[-1], x.shape[-2] + 1, x.shape[-3]), torch.nan, dtype=x.dtype)
    view = wide[..., ::2, : x.shape[-2], :].transpose(-1, -3)
    view.copy_(x)
    assert not view.is_contiguous() or x.numel() == 1
    return view


def far_apart(x):
    """The same numbers, the samples 2^31 elements apart. What lies between is never touched, so takes no memory."""
    memory = torch.empty((x.shape[0] - 1) * 2**31 + x[0].numel(), dtype=x.dtype)
    view = memory.as_strided(x.shape, (2**31, x.stride(1), x.stride(2)))
    view.copy_(x)
    return view
