"""The CUDA kernels of row_divergence's common case: sizes, schedules, launch geometry, and when they are chosen."""

import pytest
import torch

from kdaif_fast.reference.row_terms import CROSS_ENTROPY, KINDS, KL

from .row_driver import (
    A100,
    ADA,
    BLOCK,
    COMMON,
    CSRC,
    CXX,
    ELEMENTS,
    H200,
    OPTIONS,
    ORDERS,
    RING,
    SPLIT,
    WARP,
    WIDE,
    Gpu,
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
@pytest.mark.parametrize(("V", "gpu", "path"), [
    (20000, Gpu(), RING), (34000, Gpu(), RING), (34000, Gpu(1, A100), RING), (34000, Gpu(1, ADA), RING),
    (9000, Gpu(1, H200, "ring:128:2"), RING), (34001, Gpu(), WIDE), (9000, Gpu(1, H200, "wide"), WIDE),
    (34000, Gpu(20), SPLIT), (34001, Gpu(20), SPLIT),
])  # fmt: skip
def test_fast_kernels_on_wide_rows(driver, V, gpu, path, dtype):
    for setting in ("both parts", "at T = 3", "the labels alone") if path == SPLIT else COMMON:
        a = arguments(2 if path == SPLIT else 3, V, dtype, other=0.0, **COMMON[setting])
        assert driver.plan(a, gpu).path == path
        a.labels[0] = V - 1
        ours = driver.fast(a, 3, gpu=gpu)
        check_loss_and_grad(ours, a)
        again = driver.fast(a, ORDERS["warp by warp"], gpu=gpu)
        assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wish", ["ring:64", "ring:128", "ring:256:2"])
def test_rings_of_every_length(driver, wish, dtype):
    """Rows that a ring holds, that it holds in part, and shorter than what it is filled with at the start."""
    for V in (64, 1000, 2048, 2056, 10000):
        for shared in (H200, 40000):
            gpu, a = Gpu(2, shared, wish), arguments(7, V, dtype, other=0.0)
            a.labels[2:4] = -100
            if driver.plan(a, gpu).path != RING:
                continue
            results = [driver.fast(a, order, gpu=gpu) for order in (ORDERS["random"], ORDERS["warp by warp"])]
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
            check_loss_and_grad(results[0], a)
            alone = driver.fast(a, 3, gpu=gpu, want=(True, False))
            torch.testing.assert_close(alone[0], results[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("V", "K", "gpu"), [
    (9000, 1, Gpu()), (20000, 5, Gpu(2)), (20000, 4, Gpu(2, A100)), (2048, 3, Gpu(2, H200, "ring:64")),
    (2056, 6, Gpu(3, 60000, "ring:64")),
])  # fmt: skip
def test_products_of_long_rows(driver, V, K, gpu, dtype):
    for setting in ("both parts", "at T = 1"):
        a = arguments(3, V, dtype, other=0.0, **COMMON[setting])
        a.labels[1] = -100
        u = tangents(a, K)
        results = [driver.fast_hvp(a, u, order, gpu=gpu) for order in (ORDERS["random"], ORDERS["warp by warp"])]
        assert torch.equal(*results)
        check_hvp(results[0], a, u, True)


def shape(N, V, dtype):
    """A plan for tensors that are not there: geometry asks for their addresses only."""
    a = arguments(1, 1, dtype, other=0.0)
    d = a.structure()
    d.N, d.V, d.class_count = N, V, V
    d.student = d.teacher = 4096
    d.student_stride = d.teacher_stride = V
    return d, ELEMENTS[dtype]


@pytest.mark.parametrize(("N", "V", "dtype", "path", "width", "packets", "grid", "threads"), [
    (4096, 100, torch.float32, WARP, 4, 1, (1024, 1), 128),
    (4097, 10, torch.bfloat16, WARP, 1, 8, (1025, 1), 128),
    (4096, 1000, torch.bfloat16, BLOCK, 8, 2, (4096, 1), 64),
    (4096, 1000, torch.float32, BLOCK, 4, 2, (4096, 1), 128),
    (8192, 32000, torch.bfloat16, RING, 8, 0, (132, 1), 512),
    (8192, 32000, torch.float32, RING, 4, 0, (132, 1), 512),
    (8192, 50257, torch.bfloat16, WIDE, 1, 0, (8192, 1), 512),
    (4, 128256, torch.bfloat16, SPLIT, 8, 0, (15, 4), 512),
    (1, 1 << 33, torch.float32, SPLIT, 4, 0, (264, 1), 512),
    (8192, 1 << 33, torch.float32, WIDE, 4, 0, (8192, 1), 512),
    (1 << 40, 8, torch.float32, WARP, 4, 1, (0x7FFFFFFF, 1), 128),
])  # fmt: skip
def test_geometry(driver, N, V, dtype, path, width, packets, grid, threads):
    plan = driver.plan_of(*shape(N, V, dtype), Gpu(132))
    assert (plan.path, plan.width, plan.packets) == (path, width, packets)
    assert ((plan.blocks, plan.blocks_y), plan.threads) == (grid, threads)
    if path in (WARP, BLOCK):
        assert (32 if path == WARP else threads) * width * packets >= V
    if path == SPLIT:
        assert plan.chunk * (plan.chunks - 1) < V <= plan.chunk * plan.chunks
        assert plan.chunk % 16 == 0
        assert plan.workspace == N * plan.chunks * 7


@pytest.mark.parametrize(("V", "dtype", "shared", "wish", "expected"), [
    (32000, torch.bfloat16, H200, None, (512, 7, 4, 4, 0)),  # threads, slots, chunks of a row, kept, again
    (32000, torch.bfloat16, A100, None, (512, 5, 4, 3, 1)),
    (32000, torch.bfloat16, ADA, None, (256, 6, 8, 4, 4)),
    (32000, torch.float32, H200, None, (512, 7, 8, 5, 3)),
    (128256, torch.bfloat16, H200, None, (512, 7, 16, 5, 11)),
    (32000, torch.bfloat16, H200, "ring:256:2", (256, 6, 8, 4, 4)),
])  # fmt: skip
def test_geometry_of_rings(driver, V, dtype, shared, wish, expected):
    plan = driver.plan_of(*shape(8192, V, dtype), Gpu(132, shared, wish))
    assert plan.path == RING
    assert (plan.threads, plan.slots, plan.ring_chunks, plan.kept, plan.again) == expected
    assert plan.ring_chunks == plan.kept + plan.again == -(-V // (plan.threads * plan.width * 2))
    assert plan.shared == plan.slots * plan.threads * 2 * 2 * 16 <= plan.shared_limit == shared - 2048
    assert plan.blocks == 132 * (2 if wish else 1)


@pytest.mark.parametrize(("wish", "path"), [
    (None, RING), ("", RING), ("wide", WIDE), ("block", WIDE), ("nonsense:7", RING), ("ring:77", RING),
])  # fmt: skip
def test_wishes_that_cannot_be_met(driver, wish, path):
    plan = driver.plan_of(*shape(8192, 32000, torch.bfloat16), Gpu(132, H200, wish))
    assert (plan.path, plan.threads) == (path, 512)


@pytest.mark.parametrize(("N", "V", "K", "dtype", "expected"), [
    (4096, 100, 1, torch.float32, (WARP, 4, 1024, 128, 4096)),  # path, width, blocks, threads, items
    (4096, 1000, 8, torch.bfloat16, (WARP, 8, 2048, 128, 8192)),
    (4096, 1000, 8, torch.float32, (BLOCK, 4, 8192, 128, 8192)),
    (8192, 32000, 1, torch.bfloat16, (RING, 8, 132, 512, 8192)),
    (8192, 32000, 8, torch.bfloat16, (RING, 8, 132, 256, 16384)),
    (16, 50257, 64, torch.bfloat16, (BLOCK, 1, 256, 512, 256)),
    (1 << 20, 1 << 40, 1 << 10, torch.float32, (BLOCK, 4, 1 << 28, 512, 1 << 28)),
])  # fmt: skip
def test_geometry_of_products(driver, N, V, K, dtype, expected):
    plan = driver.hvp_plan(*shape(N, V, dtype), K, Gpu(132))
    assert (plan.path, plan.width, plan.blocks, plan.threads, plan.items) == expected
    if plan.path == RING:
        assert plan.ring_chunks == plan.kept + plan.again
        assert plan.shared == plan.slots * plan.threads * (1 + min(K, 4)) * 16 <= plan.shared_limit == H200 - 2048


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
