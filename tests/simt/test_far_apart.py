"""Every CUDA kernel on rows so far apart that 32 bits count neither their elements nor their bytes.

UBSan ends the process where an offset overflows. What lies between the rows is never touched, so takes no memory.
"""

import pytest
import torch

from kdaif_fast.reference.row_terms import DECOUPLED, KL
from tests.far import far
from tests.triton_kernels.persample_cases import directions, inputs

from . import test_persample_dot, test_row_stats
from .building import CSRC, CXX
from .row_driver import Gpu, arguments, tangents

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


def same(ours, expected):
    return all(torch.equal(x.nan_to_num(-1e30), y.nan_to_num(-1e30)) for x, y in zip(ours, expected, strict=True))


# Widths and GPUs that between them lead to each of the fast kernels: a warp's rows, a block's, a block's that are read
# twice or pass through shared memory, several blocks'; with wide loads and without.
FAST = [
    *((40, Gpu()), (41, Gpu()), (2104, Gpu()), (2101, Gpu()), (20000, Gpu())),
    *((34000, Gpu(20)), (34001, Gpu(20)), (20000, Gpu(wish="ring")), (20000, Gpu(wish="wide"))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "gpu"), FAST)
def test_common_losses(driver, V, gpu, dtype):
    a = arguments(2, V, dtype, other=0.0)
    moved = a._replace(student=far(a.student), teacher=far(a.teacher))
    assert driver.plan(moved, gpu) == driver.plan(a, gpu)
    assert same(driver.fast(moved, gpu=gpu), driver.fast(a, gpu=gpu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "gpu"), [(40, Gpu()), (41, Gpu()), (2104, Gpu()), (2101, Gpu(20)), (9000, Gpu(wish="ring"))]
)
def test_common_products(driver, V, gpu, dtype):
    a, extra = arguments(2, V, dtype, other=0.0), {"gpu": gpu}
    u = tangents(a, 3)
    expected = driver.fast_hvp(a, u, **extra)
    assert torch.equal(driver.fast_hvp(a._replace(student=far(a.student)), u, **extra), expected)
    assert torch.equal(driver.fast_hvp(a, far(u), **extra), expected)
    rows = far(u.transpose(0, 1).contiguous()).transpose(0, 1)  # far apart from row to row
    assert torch.equal(driver.fast_hvp(a, rows, **extra), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [KL, DECOUPLED])
def test_every_option(driver, kind, dtype):
    a = arguments(2, 300, dtype, kind=kind, second=True, gate=0.4, label_mix=0.2, mask=2, soft_labels=True)
    apart = {name: far(getattr(a, name)) for name in ("student", "teacher", "second", "soft_labels")}
    apart["mask"] = far(a.mask.view(torch.uint8)).view(torch.bool)
    moved, u = a._replace(**apart), tangents(a, 2)
    assert same(driver.loss_and_grad(moved), driver.loss_and_grad(a))
    assert torch.equal(driver.hvp(moved, far(u)), driver.hvp(a, u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_statistics(row_stats_driver, has_teacher, dtype):
    student, teacher, labels = test_row_stats.inputs(2, 300, dtype)
    teacher[-1] = student[-1]  # a third pass
    apart = (far(student), far(teacher) if has_teacher else None, labels)
    ours = test_row_stats.run(row_stats_driver, 3, *apart)
    assert same(ours, test_row_stats.run(row_stats_driver, 3, student, teacher if has_teacher else None, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers(persample_dot_driver, dtype):
    a, b = inputs((2, 2, 20), 70, dtype)
    v = directions(2, 70, 20, dtype)
    run = test_persample_dot.run
    expected = run(persample_dot_driver, 3, a, b, v)
    assert torch.equal(run(persample_dot_driver, 3, far(a), far(b), v), expected)
    positions = [far(x.transpose(0, 1).contiguous()).transpose(0, 1) for x in (a, b)]
    assert torch.equal(run(persample_dot_driver, 3, *positions, v), expected)
    wide = v.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(run(persample_dot_driver, 3, a, b, far(wide)), expected)
