"""What both CUDA paths of row_divergence make of unusual rows: strides, labels, infinities, NaN, extremes."""

import math
import mmap

import pytest
import torch

from kdaif_fast.reference import row_divergence as reference
from kdaif_fast.reference.row_terms import DECOUPLED, KINDS, KL

from .row_driver import ADA, CSRC, CXX, H200, Gpu, Trapped, arguments, check_hvp, check_loss_and_grad, error, tangents

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


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


CASES = [
    ("general", 70, None), ("fast", 70, Gpu()), ("fast", 601, Gpu()), ("fast", 34000, Gpu()), ("fast", 34001, Gpu()),
    ("fast", 34000, Gpu(20)), ("fast", 8800, Gpu(1, ADA)), ("fast", 1000, Gpu(1, H200, "ring:64")),
]  # fmt: skip


@pytest.mark.parametrize(("which", "V", "gpu"), CASES)
def test_ignored_rows_are_zero_whatever_their_logits(driver, which, V, gpu):
    extra = {"gpu": gpu} if which == "fast" else {}
    a = arguments(3, V, other=0.0)
    a.labels[1], a.student[1], a.teacher[1], a.weight[1] = -100, math.nan, math.inf, math.nan
    loss, grad = both(driver)[which](a, **extra)
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert not grad.isnan().any()
    out = both_hvp(driver)[which](a, tangents(a, 1), **extra)
    assert (out[:, 1] == 0).all()
    assert not out.isnan().any()


@pytest.mark.parametrize(("which", "V", "gpu"), CASES)
@pytest.mark.parametrize("label", [-1, None])
def test_labels_outside(driver, capfd, which, V, gpu, label):
    extra = {"gpu": gpu} if which == "fast" else {}
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


@pytest.mark.parametrize(("which", "V", "gpu"), CASES)
def test_a_nan_stays_in_its_row(driver, which, V, gpu):
    extra = {"gpu": gpu} if which == "fast" else {}
    for side in ("student", "teacher"):
        a = arguments(3, V, other=0.0)
        getattr(a, side)[1, V // 2] = math.nan
        products = both_hvp(driver)[which](a, tangents(a)[:1], **extra)
        assert not products[0, ::2].isnan().any()
        assert products[0, 1].isnan().all() or side == "teacher"
        loss, grad = both(driver)[which](a, **extra)
        assert loss.isnan().tolist() == grad.isnan().all(-1).tolist() == [False, True, False]
        assert grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(("which", "V", "gpu"), CASES)
def test_excluded_classes(driver, which, V, gpu):
    """-inf on both sides; on the teacher's alone; and, more than a tile of it, before the first finite logit."""
    extra = {"gpu": gpu} if which == "fast" else {}
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


@pytest.mark.parametrize(("which", "V", "gpu"), CASES)
@pytest.mark.parametrize("least", [-1e30, -1e37, torch.finfo(torch.float32).min])
def test_classes_excluded_by_the_least_number(driver, which, V, gpu, least):
    """All but a few classes at the row's end: most threads see nothing else, and some see it first."""
    extra = {"gpu": gpu} if which == "fast" else {}
    for T in (1.0, 2.0, 3.0):
        a = arguments(3, V, T=T, other=0.0)
        a.labels[:] = V - 1
        for logits in (a.student, a.teacher):
            logits[0, : V - 40] = logits[1, 20:-1] = least
        check_loss_and_grad(both(driver)[which](a, **extra), a)
        u = tangents(a, 1)
        check_hvp(both_hvp(driver)[which](a, u, **extra), a, u, False)


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
