"""The CUDA kernels of row_divergence, run on the CPU under several thread schedules, against the reference."""

import math
import mmap
import subprocess

import pytest
import torch

from kdaif_fast.reference import row_divergence as reference
from kdaif_fast.reference.row_terms import (
    CROSS_ENTROPY,
    DECOUPLED,
    JENSEN_SHANNON,
    KINDS,
    KL,
    LOG_COSH,
    LOGIT_MSE,
    PROBABILITIES,
    SWAPPED_CROSS_ENTROPY,
    TOP_K,
)

from .row_driver import (
    BLOCK,
    CSRC,
    CXX,
    ELEMENTS,
    ORDERS,
    SPLIT,
    WARP,
    WIDE,
    Driver,
    Trapped,
    arguments,
    compile_driver,
    error,
)

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")

GRAD_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}

OPTIONS = {
    "none": {},
    "a slice of the classes": {"first_class": 3, "class_count": 20},
    "a mask for each row": {"mask": 4},
    "one mask": {"mask": 1},
    "without the label": {"exclude_label": True},
    "mixed with the label": {"label_mix": 0.3},
    "two teachers": {"second": True, "gate": 0.4},
    "between teacher and student": {"interpolation": 0.6},
    "the student as its own teacher": {"interpolation": 0.0},
    "smoothing": {"smoothing": 0.1},
    "soft labels": {"soft_labels": True},
    "soft labels in the target": {"soft_labels": True, "label_mix": 0.3, "mask": 4, "exclude_label": True},
    "class weights": {"class_weight": True},
    "settings by row": {"rows": True},
    "no weights": {"weight": False},
    "no cross-entropy": {"ce": 0.0},
    "no divergence": {"kd": 0.0, "other": 0.0},
    "probabilities": {"form": PROBABILITIES},
    "probabilities without the label": {"form": PROBABILITIES, "exclude_label": True, "mask": 4},
    "two of probabilities": {"form": PROBABILITIES, "second": True, "gate": 0.4, "label_mix": 0.2},
    "top k": {"form": TOP_K},
    "all classes as top k": {"form": TOP_K, "top_k": 33},
    "top k and more": {"form": TOP_K, "mask": 4, "exclude_label": True, "label_mix": 0.2, "class_weight": True,
                       "first_class": 2, "class_count": 25},
    "nearly everything": {"second": True, "label_mix": 0.2, "exclude_label": True, "mask": 4, "class_weight": True,
                          "smoothing": 0.1, "first_class": 2, "class_count": 25, "rows": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    library = tmp_path_factory.mktemp("simt") / "row_divergence.so"
    compile_driver(library, "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    return Driver(library)


def tangents(a, K=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(K, *a.student.shape, dtype=torch.float64, generator=g).to(a.student.dtype)


def check_loss_and_grad(ours, a):
    dtype, wide = a.student.dtype, a.wide()
    loss, grad = ours
    if a.student.shape[1] == 1:  # nothing to decide: the reference is 0 up to rounding
        assert max(loss.abs().max(), grad.abs().max()) < 1e-5
        return
    assert error(loss, reference.row_divergence(*wide)) < LOSS_TOLERANCE[dtype]
    assert error(grad, reference.row_divergence_grad(*wide)) < GRAD_TOLERANCE[dtype]


def check_hvp(ours, a, u, gauss_newton):
    expected = reference.row_divergence_hvp(u.double(), gauss_newton, *a.wide())
    assert error(ours, expected) < 3 * GRAD_TOLERANCE[a.student.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_option(driver, kind, dtype):
    for chosen in OPTIONS.values():
        if kind in (LOGIT_MSE, LOG_COSH) and "form" in chosen:
            continue  # a divergence between logits needs logits
        a = arguments(4, 33, dtype, kind=kind, **chosen)
        a.labels[:2] = torch.tensor([4, 32])  # inside the slices above, and outside
        check_loss_and_grad(driver.loss_and_grad(a), a)
        u = tangents(a, K=5 if dtype == torch.float64 else 1)
        for gauss_newton in (False, True):
            check_hvp(driver.hvp(a, u, gauss_newton), a, u, gauss_newton)


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("V", [1, 2, 31, 33, 130, 700, 2100])
def test_sizes_types_and_schedules(driver, V, dtype):
    """The same bits whatever the order of the threads."""
    settings = [{"kind": JENSEN_SHANNON}, {"kind": DECOUPLED, "form": TOP_K, "smoothing": 0.1}, {"kind": KL, "mask": 1}]
    for setting in settings:
        a = arguments(2, V, dtype, **setting)
        u = tangents(a, K=5)
        results = [(*driver.loss_and_grad(a, order), driver.hvp(a, u, True, order)) for order in ORDERS.values()]
        for others in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))
        check_loss_and_grad(results[0][:2], a)
        if V > 1:
            check_hvp(results[0][2], a, u, True)


COMMON = {
    "both parts": {},
    "at T = 1": {"T": 1.0},
    "cross-entropy with the teacher": {"kind": CROSS_ENTROPY, "ce": 0.0},
    "the teacher alone": {"ce": 0.0, "weight": False},
    "the labels alone": {"kd": 0.0},
}


def orders_for(V):
    return [*ORDERS.values()] if V < 1000 else [ORDERS["reverse"], ORDERS["random"]]


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
        again = driver.fast(a, 1, multiprocessors=multiprocessors)
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


def both(driver):
    return {"general": driver.loss_and_grad, "fast": driver.fast}


def both_hvp(driver):
    return {"general": driver.hvp, "fast": driver.fast_hvp}


@pytest.mark.parametrize("which", ["general", "fast"])
def test_strides_and_alignment_change_nothing(driver, which):
    a = arguments(5, 40, other=0.0)
    padded = torch.full((5, 65), math.nan)
    padded[:, 1:41] = a.student
    moved = a._replace(student=padded[:, 1:41], teacher=a.teacher[:1].expand(5, 40))
    same = a._replace(teacher=a.teacher[:1].repeat(5, 1))
    ours, expected = both(driver)[which](moved), both(driver)[which](same)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y)
    tangent = tangents(a, 12)[::2]
    hvp = both_hvp(driver)[which]
    assert torch.equal(hvp(a, tangent), hvp(a, tangent.contiguous()))
    shifted = torch.cat([torch.full((12 * 200 + 1,), math.nan), tangent.flatten()])[-tangent.numel() :].view_as(tangent)
    torch.testing.assert_close(hvp(moved, shifted), hvp(same, tangent))


@pytest.mark.parametrize("which", ["general", "fast"])
def test_rows_further_apart_than_32_bits_can_count(driver, which):
    stride = (1 << 30) + 8  # the third row begins beyond element 2^31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, (2 * stride + 40) * 2, flags=flags)
    except OSError:
        pytest.skip("no address space for rows so far apart")
    far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, 40), (stride, 1))
    a = arguments(3, 40, torch.bfloat16, other=0.0)
    far.copy_(a.student)
    ours, expected = both(driver)[which](a._replace(student=far)), both(driver)[which](a)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    hvp, u = both_hvp(driver)[which], tangents(a)[:1]
    assert torch.equal(hvp(a._replace(student=far), u), hvp(a, u))
    far.copy_(u[0])
    assert torch.equal(hvp(a, far[None]), hvp(a, u))


@pytest.mark.parametrize(("which", "V"), [("general", 70), ("fast", 70), ("fast", 601), ("fast", 34000)])
@pytest.mark.parametrize("want", [(True, False), (False, True)])
def test_loss_or_gradient_alone(driver, which, V, want):
    a = arguments(2, V, other=0.0)
    expected, ours = both(driver)[which](a), both(driver)[which](a, want=want)
    for x, y, wanted in zip(ours, expected, want, strict=True):
        assert torch.equal(x, y) if wanted else x.isnan().all()


CASES = [("general", 70, 1), ("fast", 70, 1), ("fast", 601, 1), ("fast", 34000, 1), ("fast", 34000, 20)]


@pytest.mark.parametrize(("which", "V", "multiprocessors"), CASES)
def test_ignored_rows_are_zero_whatever_their_logits(driver, which, V, multiprocessors):
    extra = {"multiprocessors": multiprocessors} if which == "fast" else {}
    a = arguments(3, V, other=0.0)
    a.labels[1], a.student[1], a.teacher[1], a.weight[1] = -100, math.nan, math.inf, math.nan
    loss, grad = both(driver)[which](a, **extra)
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert not grad.isnan().any()
    out = both_hvp(driver)[which](a, tangents(a, 1), **extra)
    assert (out[:, 1] == 0).all()
    assert not out.isnan().any()


@pytest.mark.parametrize(("which", "V", "multiprocessors"), CASES)
@pytest.mark.parametrize("label", [-1, None])
def test_labels_outside(driver, capfd, which, V, multiprocessors, label):
    extra = {"multiprocessors": multiprocessors} if which == "fast" else {}
    a = arguments(3, V, other=0.0)
    a.labels[1] = V if label is None else label
    with pytest.raises(Trapped):
        both(driver)[which](a, **extra)
    message = f"row_divergence: labels[1] = {a.labels[1]}, expected 0 <= label < {V}"
    assert capfd.readouterr().out.splitlines()[0] == message
    loss, grad = both(driver)[which](a, check=False, **extra)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(-1).tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]
    hvp = both_hvp(driver)[which]
    with pytest.raises(Trapped):
        hvp(a, tangents(a, 1), **extra)
    assert hvp(a, tangents(a, 1), check=False, **extra).isnan().all(-1)[0].tolist() == [False, True, False]


@pytest.mark.parametrize("index", [-1, 70])
def test_top_k_indices_outside(driver, capfd, index):
    a = arguments(3, 70, form=TOP_K)
    a.indices[2, 3] = index
    with pytest.raises(Trapped):
        driver.loss_and_grad(a)
    assert (
        capfd.readouterr().out.splitlines()[0] == f"row_divergence: indices[2, 3] = {index}, expected 0 <= index < 70"
    )
    loss, grad = driver.loss_and_grad(a, check=False)
    assert loss.isnan().tolist() == grad.isnan().all(-1).tolist() == [False, False, True]
    a.labels[2] = -100
    assert driver.loss_and_grad(a)[0][2] == 0


@pytest.mark.parametrize(("which", "V", "multiprocessors"), CASES)
def test_a_nan_stays_in_its_row(driver, which, V, multiprocessors):
    extra = {"multiprocessors": multiprocessors} if which == "fast" else {}
    for side in ("student", "teacher"):
        a = arguments(3, V, other=0.0)
        getattr(a, side)[1, V // 2] = math.nan
        products = both_hvp(driver)[which](a, tangents(a)[:1], **extra)
        assert not products[0, ::2].isnan().any()
        assert products[0, 1].isnan().all() or side == "teacher"
        loss, grad = both(driver)[which](a, **extra)
        assert loss.isnan().tolist() == grad.isnan().all(-1).tolist() == [False, True, False]
        assert grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(("which", "V", "multiprocessors"), CASES)
def test_excluded_classes(driver, which, V, multiprocessors):
    """-inf on both sides; on the teacher's alone; and, more than a tile of it, before the first finite logit."""
    extra = {"multiprocessors": multiprocessors} if which == "fast" else {}
    a = arguments(3, V, other=0.0)
    a.labels[:] = V - 1
    a.student[0, 3] = a.teacher[0, 3] = a.teacher[1, 5] = -math.inf
    a.student[2, : V - 3] = a.teacher[2, : V - 3] = -math.inf
    _, grad = ours = both(driver)[which](a, **extra)
    check_loss_and_grad(ours, a)
    assert grad[0, 3] == 0
    assert (grad[2, : V - 3] == 0).all()
    u = tangents(a, 1)
    check_hvp(both_hvp(driver)[which](a, u, **extra), a, u, False)
    # What only the teacher allows costs everything.
    a.student[0, 7] = -math.inf
    assert both(driver)[which](a, **extra)[0].isposinf().tolist() == [a.weight[0] > 0, False, False]


def test_excluded_classes_of_every_kind(driver):
    for kind in KINDS:
        a = arguments(2, 40, torch.float64, kind=kind)
        a.student[:, 3] = a.teacher[:, 3] = -math.inf
        if kind not in (LOGIT_MSE, LOG_COSH, SWAPPED_CROSS_ENTROPY, KL):
            a.teacher[0, 5] = -math.inf
        a.labels[:] = 1
        check_loss_and_grad(driver.loss_and_grad(a), a)
        for gauss_newton in (False, True):
            check_hvp(driver.hvp(a, tangents(a), gauss_newton), a, tangents(a), gauss_newton)


@pytest.mark.parametrize(("which", "kind"), [("general", KL), ("general", DECOUPLED), ("fast", KL)])
def test_divergence_of_equal_and_nearly_equal_logits(driver, which, kind):
    for T in (0.01, 1.0, 1e4):
        a = arguments(4, 700, T=T, ce=0.0, kd=1.0, other=float(kind == DECOUPLED), kind=kind, weight=False)
        equal = a._replace(teacher=a.student.clone())
        loss, grad = both(driver)[which](equal)
        assert (loss == 0).all()
        assert grad.abs().max() < 1e-6 / T
    a = arguments(4, 700, T=2.0, ce=0.0, kd=1.0, other=float(kind == DECOUPLED), kind=kind, weight=False)
    near = a._replace(teacher=a.student + 1e-3 * torch.randn(4, 700, generator=torch.Generator().manual_seed(0)))
    loss = both(driver)[which](near)[0]
    expected = reference.row_divergence(*near.wide())
    assert (loss >= 0).all()
    assert error(loss, expected) < 1e-3


@pytest.mark.parametrize("which", ["general", "fast"])
@pytest.mark.parametrize("T", [0.01, 1e4])
@pytest.mark.parametrize("scale", [1.0, 5e3])
def test_extreme_temperatures_and_logits(driver, which, T, scale):
    a = arguments(3, 130, T=T, other=0.0, weight=False)
    a.student.mul_(scale).clamp_(-1e4, 1e4)
    a.teacher.mul_(scale).clamp_(-1e4, 1e4)
    loss, grad = both(driver)[which](a)
    wide = a.wide()
    assert error(loss, reference.row_divergence(*wide)) < 2e-5
    assert error(grad, reference.row_divergence_grad(*wide)) < 2e-4
    assert not loss.isnan().any()


def test_parts_without_weight_are_not_looked_at(driver):
    for which, run in both(driver).items():
        a = arguments(2, 40, kd=0.0, other=0.0)
        a.teacher.fill_(math.nan)
        assert not run(a)[1].isnan().any(), which
    for kind in KINDS:
        a = arguments(2, 40, kind=kind, kd=0.0, other=0.0)
        a.teacher.fill_(math.nan)
        assert not driver.loss_and_grad(a)[1].isnan().any()
        assert not driver.hvp(a, tangents(a)).isnan().any()
    a = arguments(2, 40, kind=KL, kd=0.0)
    a.student[:, 3] = -math.inf  # forward KL would be infinite
    a.labels[:] = 1
    check_loss_and_grad(driver.loss_and_grad(a), a)


def test_without_labels_or_teacher(driver):
    a = arguments(2, 40, ce=0.0)._replace(labels=None)
    check_loss_and_grad(driver.loss_and_grad(a), a)
    fast = arguments(2, 40, ce=0.0, other=0.0)._replace(labels=None)
    check_loss_and_grad(driver.fast(fast), fast)
    a = arguments(2, 40)._replace(teacher=None)
    check_loss_and_grad(driver.loss_and_grad(a), a)
    check_loss_and_grad(driver.fast(a), a)
    check_hvp(driver.hvp(a, tangents(a)), a, tangents(a), False)


def test_rows_without_any_class(driver):
    """The mask allows nothing, or nothing but the label: no divergence."""
    for kind in KINDS:
        a = arguments(2, 20, torch.float64, kind=kind, mask=2, exclude_label=True)
        a.mask[0], a.mask[1] = False, False
        a.mask[1, a.labels[1]] = True
        check_loss_and_grad(driver.loss_and_grad(a), a)
        check_hvp(driver.hvp(a, tangents(a), True), a, tangents(a), True)


def test_more_top_classes_than_a_tile(driver):
    a = arguments(2, 5000, torch.float64, form=TOP_K, top_k=3000, exclude_label=True)
    check_loss_and_grad(driver.loss_and_grad(a, 3), a)


def test_address_sanitizer_is_silent(tmp_path):
    program = tmp_path / "row_divergence"
    compile_driver(program, "-O0", "-fsanitize=address")
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert (result.returncode, result.stdout.strip()) == (0, "clean"), result.stderr
