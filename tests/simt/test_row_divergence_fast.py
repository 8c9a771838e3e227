"""The CUDA kernels of row_divergence's common case: sizes, schedules, launch geometry, and when they are chosen."""

import pytest
import torch

from kdaif_fast.reference.row_terms import CROSS_ENTROPY, KINDS, KL

from .row_driver import (
    BLOCK,
    COMMON,
    CSRC,
    CXX,
    ELEMENTS,
    OPTIONS,
    ORDERS,
    SPLIT,
    WARP,
    WIDE,
    arguments,
    check_hvp,
    check_loss_and_grad,
    tangents,
)

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


def orders_for(V):
    return [*ORDERS.values()] if V < 1000 else [ORDERS["warp by warp, last first"], ORDERS["random"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 2, 31, 33, 130, 136, 700, 704, 2100, 5000])
def test_fast_kernels_at_every_size(driver, V, dtype):
    for setting in COMMON.values():
        a = arguments(2, V, dtype, other=0.0, **setting)
        assert driver.plan(a).is_common
        results = [driver.fast(a, order) for order in orders_for(V)]
        for others in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))
        check_loss_and_grad(results[0], a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "multiprocessors", "path"), [
    (20000, 1, None), (20001, 1, WIDE), (34000, 1, WIDE), (34000, 20, SPLIT), (34001, 20, SPLIT),
])  # fmt: skip
def test_fast_kernels_on_wide_rows(driver, V, multiprocessors, path, dtype):
    for setting in ("both parts", "at T = 1", "the labels alone"):
        a = arguments(2, V, dtype, other=0.0, **COMMON[setting])
        plan = driver.plan(a, multiprocessors)
        assert plan.path == path or path is None
        a.labels[0] = V - 1
        ours = driver.fast(a, 3, multiprocessors=multiprocessors)
        check_loss_and_grad(ours, a)
        again = driver.fast(a, ORDERS["warp by warp"], multiprocessors=multiprocessors)
        assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 2, 31, 33, 130, 136, 704, 2100])
def test_fast_products_at_every_size(driver, V, dtype):
    for setting in COMMON.values() if V < 700 else [COMMON["both parts"]]:
        a = arguments(2, V, dtype, other=0.0, **setting)
        for K, multiprocessors in ((1, 1), (9, 1), (9, 20)):  # the last: several blocks a row
            u = tangents(a, K)
            results = [driver.fast_hvp(a, u, order, multiprocessors=multiprocessors) for order in orders_for(V)]
            assert all(torch.equal(results[0], others) for others in results[1:])
            if V > 1:
                check_hvp(results[0], a, u, True)
            else:
                assert results[0].abs().max() < 1e-5


def shape(N, V, dtype, multiprocessors=132):
    """A plan for tensors that are not there: geometry asks for their addresses only."""
    a = arguments(1, 1, dtype, other=0.0)
    d = a.structure()
    d.N, d.V, d.class_count = N, V, V
    d.student = d.teacher = 4096
    d.student_stride = d.teacher_stride = V
    return d, ELEMENTS[dtype], multiprocessors


@pytest.mark.parametrize(("N", "V", "dtype", "path", "width", "packets", "grid", "threads"), [
    (4096, 100, torch.float32, WARP, 4, 1, (1024, 1), 128),
    (4097, 10, torch.bfloat16, WARP, 1, 8, (1025, 1), 128),
    (4096, 1000, torch.bfloat16, WARP, 8, 4, (1024, 1), 128),
    (4096, 1000, torch.float32, BLOCK, 4, 4, (4096, 1), 64),
    (8192, 32000, torch.bfloat16, BLOCK, 8, 8, (8192, 1), 512),
    (8192, 32000, torch.float32, WIDE, 4, 0, (8192, 1), 512),
    (8192, 50257, torch.bfloat16, WIDE, 1, 0, (8192, 1), 512),
    (4, 128256, torch.bfloat16, SPLIT, 8, 0, (15, 4), 512),
    (1, 1 << 33, torch.float32, SPLIT, 4, 0, (264, 1), 512),
    (1 << 40, 8, torch.float32, WARP, 4, 1, (0x7FFFFFFF, 1), 128),
])  # fmt: skip
def test_geometry(driver, N, V, dtype, path, width, packets, grid, threads):
    plan = driver.plan_of(*shape(N, V, dtype))
    assert (plan.path, plan.width, plan.packets) == (path, width, packets)
    assert ((plan.blocks, plan.blocks_y), plan.threads) == (grid, threads)
    if path in (WARP, BLOCK):
        assert (32 if path == WARP else threads) * width * packets >= V
    if path == SPLIT:
        assert plan.chunk * (plan.chunks - 1) < V <= plan.chunk * plan.chunks
        assert plan.chunk % 16 == 0
        assert plan.workspace == N * plan.chunks * 6


@pytest.mark.parametrize(("N", "V", "K", "dtype", "expected"), [
    (4096, 100, 1, torch.float32, (1, 4, 1024, 1, 128)),
    (4096, 1000, 8, torch.bfloat16, (1, 8, 1024, 1, 128)),
    (4096, 1000, 8, torch.float32, (0, 4, 4096, 1, 128)),
    (16, 50257, 64, torch.bfloat16, (0, 1, 16, 16, 512)),
    (1 << 40, 1 << 40, 1 << 40, torch.float32, (0, 4, 0x7FFFFFFF, 1, 512)),
])  # fmt: skip
def test_geometry_of_products(driver, N, V, K, dtype, expected):
    structure, element, multiprocessors = shape(N, V, dtype)
    assert driver.hvp_plan(structure, element, K, multiprocessors) == expected


def test_geometry_of_the_general_kernels(driver):
    assert driver.general_launch(5, 1) == (5, 1, 32)
    assert driver.general_launch(5, 300) == (5, 1, 128)
    assert driver.general_launch(1 << 40, 1 << 40) == (0x7FFFFFFF, 1, 256)


def test_the_fast_kernels_take_no_option_that_they_do_not_know(driver):
    for option, chosen in OPTIONS.items():
        is_common = driver.plan(arguments(4, 40, other=0.0, **({} if "other" in chosen else chosen))).is_common
        assert is_common == (option in ("none", "no weights", "no cross-entropy", "no divergence")), option
    for kind in KINDS:
        assert driver.plan(arguments(kind=kind, other=0.0)).is_common == (kind in (KL, CROSS_ENTROPY))
        assert driver.plan(arguments(kind=kind, kd=0.0, other=0.0)).is_common
    assert not driver.plan(arguments(kind=KL, other=0.1)).is_common
    assert not driver.plan(arguments(kind=KL, kd=0.0, other=0.1)).is_common


def test_loads_are_as_wide_as_alignment_permits(driver):
    a = arguments(3, 64, torch.bfloat16, other=0.0)
    assert driver.plan(a).width == 8
    padded = torch.zeros(3, 68, dtype=torch.bfloat16)
    for view in (padded[:, :64], padded.view(-1)[1:193].view(3, 64)):
        assert driver.plan(a._replace(student=view)).width == 1
        assert driver.plan(a._replace(teacher=view)).width == 1
    assert driver.plan(arguments(3, 60, torch.bfloat16, other=0.0)).width == 1
    assert driver.plan(arguments(3, 60, torch.float32, other=0.0)).width == 4
