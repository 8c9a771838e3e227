"""What the tests of kd_loss share: inputs, tolerances, and where the ops are."""

import importlib

import pytest
import torch

import kdaif_fast
from kdaif_fast.reference import kd_loss as reference

ops = importlib.import_module("kdaif_fast.ops.kd_loss")

# Largest allowed relative error (2-norm) against float64: a few rounding errors of the output's dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}
DTYPES = list(TOLERANCE)
TEMPERATURES = [1.0, 2.0, 3.0, 4.0, 2.5, 0.5]
ALPHAS = [0.0, 0.3, 1.0]
SHAPES = [(0, 5), (1, 1), (3, 1), (5, 2), (7, 37), (4, 64), (2, 1000), (33, 17)]

HAS_KERNELS = kdaif_fast.backends()["cpu"] == "loaded"
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here")


def inputs(N, V, dtype=torch.float64, scale=3.0):
    student, teacher = (scale * torch.randn(2, N, V, dtype=torch.float64)).to(dtype).unbind()
    labels = torch.randint(V, (N,))
    if N > 1:
        labels[0], labels[1] = 0, V - 1
    weight = torch.randn(N, dtype=reference.accumulation_dtype(student))
    return student, teacher, labels, weight


def relative_error(ours, expected):
    ours, expected = ours.double(), expected.double()
    assert ours.shape == expected.shape
    return ((ours - expected).norm() / expected.norm().clamp(min=1e-30)).item() if expected.numel() else 0.0
