"""kd_loss: against the textbook, its derivatives, the public call, and bad input."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from kdaif_fast import backend
from kdaif_fast.ops import kd_loss
from kdaif_fast.ops import row_ops as ops
from kdaif_fast.reference import row_divergence as reference
from tests.ops.row_cases import (
    DTYPES,
    HAS_KERNELS,
    LOSS_TOLERANCE,
    TOLERANCE,
    inputs,
    needs_kernels,
    plain_arguments,
    relative_error,
)

ALPHAS = [0.0, 0.3, 1.0]


def textbook(student, teacher, labels, weight, T, alpha):
    ce = F.cross_entropy(student, labels, reduction="none")
    kl = F.kl_div((student / T).log_softmax(-1), (teacher / T).log_softmax(-1), reduction="none", log_target=True)
    return weight * (alpha * ce + (1 - alpha) * T**2 * kl.sum(-1))


class TestDerivatives:
    """gradcheck compares with finite differences: first and second order, both modes, all differentiable inputs."""

    @pytest.fixture(params=["compiled", "reference"])
    def formula(self, request):
        if request.param == "compiled":
            yield
        else:
            with backend("reference"):
                yield

    @pytest.mark.parametrize("T", [1.0, 2.5])
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_gradcheck(self, formula, T, alpha):
        student, teacher, labels, weight = inputs(3, 4, scale=1.0)
        tensors = [x.requires_grad_() for x in (student, teacher, weight)]

        def loss(student, teacher, weight):
            return kd_loss(student, teacher, labels, weight=weight, temperature=T, alpha=alpha)

        assert gradcheck(loss, tensors, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, tensors, check_fwd_over_rev=True, check_batched_grad=True)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_gradcheck_of_reductions(self, formula, reduction):
        student, teacher, labels, weight = inputs(3, 4, scale=1.0)

        def loss(student):
            return kd_loss(student, teacher, labels, weight=weight, temperature=2.0, reduction=reduction)

        student.requires_grad_()
        assert gradcheck(loss, [student], check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, [student], check_fwd_over_rev=True, check_batched_grad=True)

    def test_third_order(self, formula):
        student, teacher, labels, weight = inputs(2, 3, scale=1.0)
        student.requires_grad_()

        def gradient(student):
            loss = kd_loss(student, teacher, labels, weight=weight, temperature=2.0, reduction="sum")
            return torch.autograd.grad(loss, student, create_graph=True)[0]

        assert gradgradcheck(gradient, [student], check_fwd_over_rev=True)

    def test_backward_twice_gives_twice_the_gradient(self):
        student, teacher, labels, _ = inputs(3, 4)
        student.requires_grad_()
        loss = kd_loss(student, teacher, labels, reduction="sum")
        loss.backward(retain_graph=True)
        once = student.grad.clone()
        student.grad.mul_(5)  # must not reach what the second backward uses
        student.grad.copy_(once)
        loss.backward()
        torch.testing.assert_close(student.grad, 2 * once, rtol=0, atol=0)

    def test_gradient_changed_in_place_is_not_used_again(self):
        student, teacher, labels, _ = inputs(3, 4)
        student.requires_grad_()
        loss = kd_loss(student, teacher, labels, reduction="sum")
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        first.zero_()
        with pytest.raises(RuntimeError, match="inplace"):  # torch's guard of what is saved; never a wrong number
            torch.autograd.grad(loss, student)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_uneven_upstream_gradient(self, dtype, reduction):
        student, teacher, labels, weight = inputs(6, 9, dtype)
        student.requires_grad_()
        wide = student.detach().double().requires_grad_()
        loss = kd_loss(student, teacher, labels, weight=weight, temperature=2.0, reduction=reduction)
        expected = textbook(wide, teacher.double(), labels, weight.double(), 2.0, 0.5)
        if reduction == "none":
            upstream = torch.randn(6, dtype=torch.float64)
            loss, expected = (loss * upstream.to(loss.dtype)).sum(), (expected * upstream).sum()
        else:
            expected = expected.sum() / (6 if reduction == "mean" else 1)
        loss.backward()
        expected.backward()
        assert relative_error(loss.detach(), expected.detach()) < 10 * LOSS_TOLERANCE[dtype]
        assert relative_error(student.grad, wide.grad) < TOLERANCE[dtype]


class TestConvenience:
    def test_leading_dimensions(self):
        student, teacher, labels, weight = inputs(12, 5)
        expected = kd_loss(student, teacher, labels, weight=weight)
        cubes = student.view(3, 4, 5), teacher.view(3, 4, 5), labels.view(3, 4)
        ours = kd_loss(*cubes, weight=weight.view(3, 4))
        assert torch.equal(ours, expected.view(3, 4))
        single = kd_loss(student[0], teacher[0], labels[0], weight=weight[0])
        assert single.shape == ()
        torch.testing.assert_close(single, expected[0])
        assert torch.equal(kd_loss(*cubes, reduction="mean"), kd_loss(student, teacher, labels, reduction="mean"))

    def test_mean_divides_by_rows_and_is_zero_for_none(self):
        student, teacher, labels, weight = inputs(5, 4)
        rows = kd_loss(student, teacher, labels, weight=weight)
        torch.testing.assert_close(kd_loss(student, teacher, labels, weight=weight, reduction="mean"), rows.sum() / 5)
        empty = torch.zeros(0, 4, requires_grad=True)
        loss = kd_loss(empty, empty.detach(), labels[:0], reduction="mean")
        loss.backward()
        assert loss == 0
        assert empty.grad.shape == (0, 4)

    def test_mixed_dtypes_take_the_wider(self):
        student, teacher, labels, _ = inputs(5, 4, torch.float32)
        ours = kd_loss(student, teacher.to(torch.bfloat16), labels)
        assert torch.equal(ours, kd_loss(student, teacher.to(torch.bfloat16).float(), labels))

    def test_integer_options_are_numbers_too(self):
        student, teacher, labels, _ = inputs(5, 4)
        a, b = (
            kd_loss(student, teacher, labels, temperature=2, alpha=1),
            F.cross_entropy(student, labels, reduction="none"),
        )
        torch.testing.assert_close(a, b)

    def test_teacher_from_inference_mode(self):
        student, teacher, labels, _ = inputs(5, 4)
        student.requires_grad_()
        with torch.inference_mode():
            made_there = teacher * 1
            weight = torch.ones(5, dtype=torch.float64)
        for reduction in ("sum", "mean"):
            loss = kd_loss(student, made_there, labels, weight=weight, reduction=reduction)
            (ours,) = torch.autograd.grad(loss, student)
            (expected,) = torch.autograd.grad(kd_loss(student, teacher, labels, reduction=reduction), student)
            assert torch.equal(ours, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("factor", [2.0**16, 0.5, 0.3])
    def test_scaled_losses(self, dtype, factor):
        """As loss scalers do: exact for powers of two, and no second rounding otherwise."""
        student, teacher, labels, _ = inputs(5, 40, dtype)
        student.requires_grad_()
        factor = min(factor, 16.0) if dtype == torch.float16 else factor
        (ours,) = torch.autograd.grad(factor * kd_loss(student, teacher, labels, reduction="mean"), student)
        scale = torch.full((5,), factor / 5)
        wide = plain_arguments(student.detach().double(), teacher.double(), labels, scale.double())
        expected = reference.row_divergence_grad(*wide)
        assert relative_error(ours, expected) < TOLERANCE[dtype]

    def test_numbers_of_numpy(self):
        import numpy as np

        student, teacher, labels, _ = inputs(5, 4)
        ours = kd_loss(student, teacher, labels, temperature=np.float32(2), alpha=np.float32(0.5))
        assert torch.equal(ours, kd_loss(student, teacher, labels, temperature=2.0, alpha=0.5))

    @pytest.mark.parametrize("formula", ["row_divergence", "row_divergence_with_grad", "row_divergence_grad"])
    def test_labels_that_nobody_looks_at(self, formula):
        """Off the CPU the reference makes the rows of illegal labels NaN, and leaves the others alone."""
        student, teacher, labels, weight = inputs(4, 5)
        wrong = labels.clone()
        wrong[1], wrong[3] = 5, -1
        function = getattr(reference, formula)
        results = ops.nan_where_label_is_outside(function, plain_arguments(student, teacher, wrong, weight, 2.0))
        expected = function(*plain_arguments(student, teacher, labels, weight, 2.0))
        for ours, right in zip(*(x if isinstance(x, tuple) else (x,) for x in (results, expected)), strict=True):
            assert ours[[1, 3]].isnan().all()
            assert torch.equal(ours[[0, 2]], right[[0, 2]])

    @needs_kernels
    def test_forms_a_gradient_only_where_one_may_be_wanted(self):
        student, teacher, labels, _ = inputs(5, 4)
        student.requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            with torch.no_grad():
                kd_loss(student, teacher, labels)
            kd_loss(student.detach(), teacher, labels)
        assert not any("with_grad" in event.key for event in profile.key_averages())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            kd_loss(student, teacher, labels)
        assert any("with_grad" in event.key for event in profile.key_averages())

    def test_works_without_gradients_and_in_inference_mode(self):
        student, teacher, labels, _ = inputs(5, 4)
        expected = kd_loss(student, teacher, labels)
        with torch.no_grad():
            assert torch.equal(kd_loss(student.requires_grad_(), teacher, labels), expected)
        with torch.inference_mode():
            assert torch.equal(kd_loss(student, teacher, labels), expected)


class TestBadInput:
    """Every message names the argument and what it was."""

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"student_logits": [[1.0]]}, TypeError, r"student_logits is \[\[1.0\]\] \(list\)"),
            (
                {"student_logits": torch.zeros(3, 4, dtype=torch.int64)},
                TypeError,
                "student_logits has dtype torch.int64",
            ),
            ({"teacher_logits": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "teacher has dtype"),
            ({"student_logits": torch.zeros(())}, ValueError, r"student_logits has shape \(\)"),
            ({"student_logits": torch.zeros(3, 0)}, ValueError, r"student_logits has shape \(3, 0\)"),
            (
                {"teacher_logits": torch.zeros(3, 5)},
                ValueError,
                r"teacher has shape \(3, 5\), expected \(3, 4\)",
            ),
            ({"teacher_logits": torch.zeros(3, 4, device="meta")}, ValueError, "teacher is on device meta"),
            ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels has shape \(2,\), expected \(3,\)"),
            ({"labels": torch.zeros(3)}, TypeError, "labels have dtype torch.float32"),
            ({"labels": torch.tensor([0, 4, 0])}, ValueError, r"labels\[1\] is 4, expected 0 <= label < 4"),
            ({"labels": torch.tensor([0, 0, -1])}, ValueError, r"labels\[2\] is -1"),
            ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\)"),
            ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
            ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive"),
            ({"temperature": -2.0}, ValueError, "temperature is -2.0"),
            ({"temperature": math.inf}, ValueError, "temperature is inf"),
            ({"temperature": math.nan}, ValueError, "temperature is nan"),
            ({"temperature": "hot"}, TypeError, "temperature is 'hot'"),
            ({"alpha": 1.5}, ValueError, "alpha is 1.5, expected a number from 0 to 1"),
            ({"alpha": -0.1}, ValueError, "alpha is -0.1"),
            ({"alpha": True}, TypeError, "alpha is True"),
            ({"reduction": "average"}, ValueError, "reduction is 'average', expected one of 'none', 'sum', 'mean'"),
        ],
    )
    @pytest.mark.parametrize("name", ["default", "reference"])
    def test_message(self, change, error, message, name):
        arguments = {
            "student_logits": torch.zeros(3, 4),
            "teacher_logits": torch.zeros(3, 4),
            "labels": torch.tensor([0, 1, 2]),
            **change,
        }
        forced = backend("reference") if name == "reference" else backend("cpu" if HAS_KERNELS else "reference")
        with forced, pytest.raises(error, match=message):
            kd_loss(**arguments)

    @pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_check_finite(self, name, value):
        arguments = {"student_logits": torch.zeros(3, 4), "teacher_logits": torch.zeros(3, 4)}
        arguments[name][1, 2] = value
        with pytest.raises(ValueError, match=rf"{name.replace('teacher_logits', 'teacher')}\[1, 2\] is {value}"):
            kd_loss(**arguments, labels=torch.tensor([0, 1, 2]), check_finite=True)
        arguments[name][1, 2] = -math.inf
        kd_loss(**arguments, labels=torch.tensor([0, 1, 3]), check_finite=True)
