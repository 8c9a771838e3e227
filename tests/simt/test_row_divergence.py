"""The CUDA kernels of row_divergence, run on the CPU under several thread schedules, against the reference."""

import math

import pytest
import torch

from kdaif_fast.reference.row_terms import (
    DECOUPLED,
    JENSEN_SHANNON,
    KINDS,
    KL,
    LOG_COSH,
    LOGIT_MSE,
    SWAPPED_CROSS_ENTROPY,
    TOP_K,
)

from .row_driver import (
    CSRC,
    CXX,
    ELEMENTS,
    OPTIONS,
    ORDERS,
    Trapped,
    arguments,
    check_hvp,
    check_loss_and_grad,
    tangents,
)

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


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
