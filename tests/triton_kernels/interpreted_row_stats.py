"""The Triton kernel of row_stats under Triton's interpreter: run by test_row_stats.py, with TRITON_INTERPRET=1 set."""

import math

import pytest
import torch

import kdaif_fast
from kdaif_fast.ops import row_stats
from tests.ops.row_stats_cases import IGNORED, assert_close, expected_of, inputs


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
class TestInterpreted:
    @pytest.fixture
    def stats_of(self):
        from kdaif_fast.triton_kernels import row_stats

        def call(student, teacher=None, labels=None, T=1.0, first=0, count=0, ignore=IGNORED):
            return row_stats.row_stats(student, teacher, labels, T, first, count, ignore)

        return call

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(0, 5), (3, 1), (2, 2), (4, 37), (2, 128), (2, 5000)])
    @pytest.mark.parametrize(
        ("has_teacher", "has_labels"), [(True, True), (True, False), (False, True), (False, False)]
    )
    def test_against_reference(self, stats_of, dtype, shape, has_teacher, has_labels):
        student, teacher, labels = inputs(*shape, dtype)
        if shape[0]:
            teacher[-1] = student[-1]  # a small divergence, which takes another pass
        V = shape[1]
        for first, count in ((0, 0), (V // 3, V - V // 3)):
            arguments = (student, teacher if has_teacher else None, labels if has_labels else None, 2.5, first, count)
            stats, argmax = stats_of(*arguments)
            expected, expected_argmax = expected_of(*arguments)
            assert_close(stats, expected, dtype)
            assert torch.equal(argmax, expected_argmax)
            if has_teacher:
                assert (stats[-2:, -1:] == 0).all()

    def test_ties_masks_and_rows_without_a_softmax(self, stats_of):
        student, teacher, labels = inputs(9, 140, torch.float32)
        labels[:] = 0
        labels[8] = IGNORED
        student[:, 3] = teacher[:, 3] = -math.inf
        student[1, 1:] = teacher[1, 1:] = -math.inf  # all but one class
        student[2, 5] = teacher[6, 5] = -math.inf  # one side only
        student[3, [66, 137]] = student[4, 7] = math.nan
        student[4, 6] = teacher[4, 0] = math.inf
        student[5] = -math.inf
        student[6] = teacher[7] = 1  # ties
        student[8, [40, 90, 139]] = 100
        stats, argmax = stats_of(student, teacher, labels, 0.5, 2, 10)
        expected, expected_argmax = expected_of(student, teacher, labels, 0.5, 2, 10)
        assert_close(stats, expected, torch.float32)
        assert torch.equal(argmax, expected_argmax)

    def test_labels_outside_make_nan_of_what_depends_on_them(self, stats_of):
        student, teacher, labels = inputs(4, 70, torch.float32)
        labels[:] = torch.tensor([0, 70, -1, 2**40])
        expected, _ = expected_of(student, teacher, labels)
        assert_close(stats_of(student, teacher, labels)[0], expected, torch.float32)

    def test_ties_and_masks_over_several_blocks(self, stats_of):
        student = torch.full((3, 9000), -math.inf)
        student[0, [4100, 8500]] = 1.0
        student[1, [4095, 4096]] = 1.0
        student[2, 8999] = -5.0
        stats, argmax = stats_of(student)
        assert argmax.tolist() == [[4100, 4095, 8999]]
        assert_close(stats, expected_of(student)[0], torch.float32)

    @pytest.mark.parametrize("T", [0.01, 1e4])
    def test_extremes(self, stats_of, T):
        student, teacher, labels = inputs(4, 70, torch.float32)
        student, teacher = (x * (1e4 / x.abs().max()) for x in (student, teacher))
        expected, _ = expected_of(student, teacher, labels, T)
        assert_close(stats_of(student, teacher, labels, T)[0], expected, torch.float32)

    def test_small_divergences_keep_their_digits(self, stats_of):
        student = 3 * torch.randn(3, 300)
        teacher = student + 1e-3 * torch.randn_like(student)
        ours, expected = stats_of(student, teacher)[0][-2:], expected_of(student, teacher)[0][-2:]
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=0)

    def test_strides(self, stats_of):
        student, teacher, labels = inputs(4, 40, torch.float32)
        padded = torch.full((4, 64), math.nan)
        padded[:, :40] = student
        ours = stats_of(padded[:, :40], teacher.t().contiguous().t(), labels, 2.0, 0, 5)
        expected = stats_of(student, teacher, labels, 2.0, 0, 5)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_forced_through_the_public_call(self):
        student, teacher, labels = inputs(6, 5, torch.float32)
        expected = row_stats(student, teacher, labels, classes=(1, 3))
        with kdaif_fast.backend("triton"):
            ours = row_stats(student, teacher, labels, classes=(1, 3))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
