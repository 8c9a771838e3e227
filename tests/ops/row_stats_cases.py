"""What the tests of row_stats share: inputs, tolerances, and where the op is."""

import importlib

import torch

import kdaif_fast
from kdaif_fast.reference import row_stats as reference

ops = importlib.import_module("kdaif_fast.ops.row_stats")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(0, 5), (1, 1), (3, 1), (5, 2), (7, 37), (4, 64), (3, 65), (2, 1000), (33, 17), (1, 3000)]
TEMPERATURES = [1.0, 2.0, 0.3]
HAS_KERNELS = kdaif_fast.backends()["cpu"] == "loaded"
IGNORED = -100


def inputs(N, V, dtype=torch.float64, scale=3.0):
    student, teacher = (scale * torch.randn(2, N, V, dtype=torch.float64)).to(dtype).unbind()
    labels = torch.randint(V, (N,))
    if N > 1:
        labels[0], labels[1] = 0, V - 1
    if N > 2:
        labels[2] = student[2].argmax()  # a label that is the largest
    return student, teacher, labels


def assert_close(ours, expected, dtype):
    """Packed statistics to a few rounding errors of sums; infinities and NaN in the same places."""
    assert ours.dtype == reference.statistics_dtype(torch.empty(0, dtype=dtype))
    tight = dtype == torch.float64
    torch.testing.assert_close(
        ours.double(),
        expected.double(),
        rtol=1e-11 if tight else 1e-5,
        atol=1e-12 if tight else 3e-6,
        equal_nan=True,
    )


def expected_of(student, teacher=None, labels=None, T=1.0, first=0, count=0, ignore=IGNORED):
    """The reference in float64."""
    teacher = None if teacher is None else teacher.double()
    return reference.row_stats(student.double(), teacher, labels, T, first, count, ignore)
