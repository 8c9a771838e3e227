"""The CPU kernels of kd_loss against the reference: every dtype, awkward shapes, strides, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdaif_fast.reference import kd_loss as reference
from tests.ops.kd_loss_cases import (
    ALPHAS,
    DTYPES,
    LOSS_TOLERANCE,
    SHAPES,
    TEMPERATURES,
    TOLERANCE,
    inputs,
    needs_kernels,
    ops,
    relative_error,
)


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
class TestKernel:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("T", TEMPERATURES)
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_against_reference(self, dtype, shape, T, alpha):
        student, teacher, labels, weight = inputs(*shape, dtype)
        wide = (student.double(), teacher.double(), labels, weight.double())
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, weight, T, alpha)
        expected_loss, expected_grad = reference.kd_loss_with_grad(*wide, T, alpha)
        assert loss.dtype == weight.dtype
        assert grad.dtype == dtype
        # A single class has zero loss and gradient; there the error is absolute.
        slack = 1.0 if shape[1] > 1 else math.inf
        assert relative_error(loss, expected_loss) < 10 * LOSS_TOLERANCE[dtype] * slack
        assert relative_error(grad, expected_grad) < TOLERANCE[dtype] * slack
        torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad.to(grad.dtype), rtol=2e-2, atol=1e-4)
        alone = ops._kd_loss(student, teacher, labels, weight, T, alpha)
        again = ops._kd_loss_grad(weight, student, teacher, labels, T, alpha)
        torch.testing.assert_close(alone, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, grad, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("T", TEMPERATURES)
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_hvp_against_reference(self, dtype, shape, T, alpha):
        student, tangent, _, weight = inputs(*shape, dtype)
        ours = ops._kd_loss_hvp(weight, tangent, student, T, alpha)
        expected = reference.kd_loss_hvp(weight.double(), tangent.double(), student.double(), T, alpha)
        assert ours.dtype == dtype
        if shape[1] == 1:
            assert ours.abs().max() < 1e-5
        else:
            assert relative_error(ours, expected) < 3 * TOLERANCE[dtype]

    @settings(max_examples=60, deadline=None)
    @given(
        N=st.integers(0, 40),
        V=st.integers(1, 200),
        dtype=st.sampled_from(DTYPES),
        T=st.floats(0.1, 20),
        alpha=st.floats(0, 1),
        scale=st.floats(0.01, 30),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(self, N, V, dtype, T, alpha, scale, seed):
        torch.manual_seed(seed)
        student, teacher, labels, weight = inputs(N, V, dtype, scale)
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, weight, T, alpha)
        wide = (student.double(), teacher.double(), labels, weight.double())
        expected_loss, expected_grad = reference.kd_loss_with_grad(*wide, T, alpha)
        # T^2 magnifies the rounding of a divergence that is itself of size 1 / T^2.
        atol = 2e-6 * max(1.0, T) ** 2 * (1e-8 if dtype == torch.float64 else 1)
        torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-5, atol=atol)
        rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-4)
        torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=rtol, atol=2e-6 * max(1.0, T))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strides(self, dtype):
        student, teacher, labels, weight = inputs(6, 10, dtype)
        expected = ops._kd_loss_with_grad(student, teacher, labels, weight, 2.0, 0.4)
        wide_rows = torch.full((6, 14), math.nan, dtype=dtype)
        wide_rows[:, 2:12] = student
        layouts = {
            "columns first": student.t().contiguous().t(),
            "part of wider rows": wide_rows[:, 2:12],
            "every other row": student.repeat_interleave(2, 0)[::2],
        }
        for name, view in layouts.items():
            assert torch.equal(view, student)
            for ours, right in zip(
                ops._kd_loss_with_grad(
                    view, teacher.t().contiguous().t(), labels.repeat_interleave(2)[::2], weight, 2.0, 0.4
                ),
                expected,
                strict=True,
            ):
                assert torch.equal(ours, right), name
        one_teacher = teacher[:1].expand(6, 10)
        ours = ops._kd_loss(student, one_teacher, labels, weight, 2.0, 0.4)
        assert torch.equal(ours, ops._kd_loss(student, one_teacher.contiguous(), labels, weight, 2.0, 0.4))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("T", [1.0, 4.0, 2.5])
    def test_masked_classes(self, dtype, T):
        """-inf on the student, the teacher or both: such a class has probability 0 there, and no NaN appears."""
        student, teacher, labels, weight = inputs(6, 9, dtype)
        labels[:] = 0
        student[:, 3] = teacher[:, 3] = -math.inf
        teacher[:, 5] = -math.inf
        student[2:4, 1:] = teacher[2:4, 1:] = -math.inf  # all but one class
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, weight, T, 0.5)
        wide = (student.double(), teacher.double(), labels, weight.double())
        expected_loss, expected_grad = reference.kd_loss_with_grad(*wide, T, 0.5)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert (grad[:, 3] == 0).all()
        torch.testing.assert_close(loss, expected_loss.to(loss.dtype), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad.to(dtype), rtol=2e-2, atol=1e-5)
        finite = torch.where(student.isfinite(), student, 0)
        hvp = ops._kd_loss_hvp(weight, finite, student, T, 0.5)
        assert hvp.isfinite().all()

    def test_class_that_only_the_student_excludes_costs_infinity(self):
        student, teacher, labels, _ = inputs(2, 4, torch.float32)
        labels[:] = 0
        student[0, 2] = -math.inf
        loss = ops._kd_loss(student, teacher, labels, torch.ones(2), 1.0, 0.5)
        assert loss[0] == math.inf
        assert loss[1].isfinite()

    def test_part_without_weight_is_not_looked_at(self):
        student, teacher, labels, _ = inputs(2, 4, torch.float32)
        student[torch.arange(2), labels] = -math.inf  # infinite cross-entropy
        teacher[torch.arange(2), labels] = -math.inf
        assert ops._kd_loss(student, teacher, labels, torch.ones(2), 1.0, 0.0).isfinite().all()
        student, teacher, labels, _ = inputs(2, 4, torch.float32)
        assert ops._kd_loss(student, teacher * math.nan, labels, torch.ones(2), 1.0, 1.0).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_huge_logits(self, dtype):
        student, teacher, labels, weight = inputs(8, 50, dtype)
        student, teacher = (x * (1e4 / x.abs().max()) for x in (student, teacher))
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, weight, 2.0, 0.5)
        wide = (student.double(), teacher.double(), labels, weight.double())
        expected_loss, expected_grad = reference.kd_loss_with_grad(*wide, 2.0, 0.5)
        assert relative_error(loss, expected_loss) < 1e-6
        assert relative_error(grad, expected_grad) < max(1e-5, TOLERANCE[dtype])

    def test_identical_logits_never_go_below_zero(self):
        student, _, labels, _ = inputs(200, 300, torch.float32)
        loss = ops._kd_loss(student, student, labels, torch.ones(200), 1.5, 0.0)
        assert (loss >= 0).all()
        assert (loss < 1e-5).all()

    def test_shift_invariance(self):
        student, teacher, labels, weight = inputs(5, 20)
        loss = ops._kd_loss(student, teacher, labels, weight, 2.0, 0.5)
        shifted = ops._kd_loss(student + 100, teacher - 70, labels, weight, 2.0, 0.5)
        torch.testing.assert_close(loss, shifted, rtol=1e-10, atol=1e-10)

    def test_result_does_not_depend_on_threads(self, threads):
        student, teacher, labels, weight = inputs(300, 257, torch.float32)
        ours = ops._kd_loss_with_grad(student, teacher, labels, weight, 2.0, 0.5)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        single = ops._kd_loss_with_grad(student, teacher, labels, weight, 2.0, 0.5)
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(ours, single, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays_in_its_row(self, dtype):
        student, teacher, labels, weight = inputs(5, 30, dtype)
        student[2, 7] = math.nan
        teacher[4, 29] = math.nan
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, weight, 2.0, 0.5)
        assert loss.isnan().tolist() == [False, False, True, False, True]
        assert grad[[0, 1, 3]].isfinite().all()
        assert grad[2].isnan().any()
        assert grad[4].isnan().any()

    @pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1, -0x400000 + 1])
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_every_nan_is_a_nan(self, bits, alpha):
        """Its low bits must not be taken for an exponent."""
        student, teacher, labels, _ = inputs(2, 40, torch.float32)
        student[0, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert student[0, 3].isnan()
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, torch.ones(2), 2.5, alpha)
        assert loss.isnan().tolist() == [True, False]
        assert grad[0].isnan().any()
        wide = torch.tensor(0x7FF8000000000123).view(torch.float64)
        student, teacher, labels, weight = inputs(2, 40, torch.float64)
        student[0, 3] = wide
        loss, grad = ops._kd_loss_with_grad(student, teacher, labels, weight, 2.5, alpha)
        assert loss.isnan().tolist() == [True, False]
        assert grad[0].isnan().any()

    @pytest.mark.parametrize("op", [ops._kd_loss, ops._kd_loss_with_grad])
    def test_opcheck(self, op):
        student, teacher, labels, weight = inputs(4, 6)
        tests = ("test_schema", "test_faketensor") if op is ops._kd_loss_with_grad else None
        options = {"test_utils": tests} if tests else {}
        student = student if tests else student.requires_grad_()
        torch.library.opcheck(op, (student, teacher, labels, weight, 2.0, 0.5), **options)

    def test_opcheck_of_derivatives(self):
        student, teacher, labels, weight = inputs(4, 6)
        torch.library.opcheck(ops._kd_loss_grad, (weight, student.requires_grad_(), teacher, labels, 2.0, 0.5))
        torch.library.opcheck(ops._kd_loss_hvp, (weight, teacher, student, 2.0, 0.5))
