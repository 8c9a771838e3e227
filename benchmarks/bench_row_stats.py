"""row_stats, everything it has, against PyTorch."""

import pytest
import torch
from baselines.eager_row_stats import eager_row_stats

from kdaif_fast.ops import row_stats

SHAPES = [
    (512, 100, torch.float32),
    (4096, 1000, torch.float32),
    (4096, 1000, torch.bfloat16),
    (4096, 1000, torch.float16),
    (4096, 1000, torch.float64),
    (1024, 32000, torch.float32),
]


def fused_row_stats(student, teacher, labels, T, classes):
    return row_stats(student, teacher, labels, temperature=T, classes=classes)._asdict()


IMPLEMENTATIONS = {
    "kdaif_fast": lambda: fused_row_stats,
    "eager": lambda: eager_row_stats,
    "torch.compile": lambda: torch.compile(eager_row_stats, fullgraph=True, dynamic=False),
}


def inputs(N, V, dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, N, V).mul(3).to(dtype).unbind()
    return student, teacher, torch.randint(V, (N,))


def case(parameters):
    N, V, dtype = parameters
    return f"[{N}, {V}] {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=case)
def bench_row_stats(measure, shape, name):
    N, V, dtype = shape
    student, teacher, labels = inputs(N, V, dtype)
    options = (2.0, (0, V // 2))
    torch.compiler.reset()
    implementation = IMPLEMENTATIONS[name]()
    exact = eager_row_stats(student.double(), teacher.double(), labels, *options)
    for field, value in implementation(student, teacher, labels, *options).items():
        torch.testing.assert_close(value.double(), exact[field].double(), rtol=1e-4, atol=1e-5)
    measure(f"row_stats {case(shape)}", name, lambda: implementation(student, teacher, labels, *options))
