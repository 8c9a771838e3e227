"""The CPU kernel of row_stats against the reference: every dtype, awkward shapes, strides, extremes."""

import math

import pytest
import torch

from kdaif_fast.reference import row_stats as reference
from tests.ops.row_stats_cases import (
    DTYPES,
    HAS_KERNELS,
    IGNORED,
    SHAPES,
    TEMPERATURES,
    assert_close,
    expected_of,
    inputs,
    ops,
)
from tests.properties import given, settings, st

LABEL_ROWS = [reference.SIDE.index(name) for name in ("label", "margin", "ce")]
LABEL_ROWS += [len(reference.SIDE) + row for row in LABEL_ROWS]


def stats_of(student, teacher=None, labels=None, T=1.0, first=0, count=0, ignore=IGNORED):
    return ops._row_stats(student, teacher, labels, T, first, count, ignore)


@pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here")
@pytest.mark.usefixtures("poisoned_memory")
class TestKernel:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("T", TEMPERATURES)
    @pytest.mark.parametrize("has_teacher", [False, True])
    @pytest.mark.parametrize("has_labels", [False, True])
    def test_against_reference(self, dtype, shape, T, has_teacher, has_labels):
        student, teacher, labels = inputs(*shape, dtype)
        V = shape[1]
        for first, count in [(0, 0), (0, V), (V // 3, V - V // 3), (V // 2, 1)]:
            arguments = (student, teacher if has_teacher else None, labels if has_labels else None, T, first, count)
            stats, argmax = stats_of(*arguments)
            expected, expected_argmax = expected_of(*arguments)
            assert_close(stats, expected, dtype)
            assert torch.equal(argmax, expected_argmax)

    @settings(max_examples=80, deadline=None)
    @given(
        N=st.integers(0, 20),
        V=st.integers(1, 200),
        dtype=st.sampled_from(DTYPES),
        T=st.floats(0.1, 100),
        scale=st.floats(0.01, 30),
        seed=st.integers(0, 2**31),
        slice_from=st.floats(0, 1),
        slice_to=st.floats(0, 1),
    )
    def test_any_shape(self, N, V, dtype, T, scale, seed, slice_from, slice_to):
        torch.manual_seed(seed)
        student, teacher, labels = inputs(N, V, dtype, scale)
        labels[torch.rand(N) < 0.2] = IGNORED
        first = int(min(slice_from, slice_to) * V)
        arguments = (student, teacher, labels, T, first, int(max(slice_from, slice_to) * V) - first)
        stats, argmax = stats_of(*arguments)
        expected, expected_argmax = expected_of(*arguments)
        assert_close(stats, expected, dtype)
        assert torch.equal(argmax, expected_argmax)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strides(self, dtype):
        student, teacher, labels = inputs(6, 37, dtype)
        expected = stats_of(student, teacher, labels, 2.0, 5, 20)
        padded = torch.full((6, 45), math.nan, dtype=dtype)
        padded[:, 3:40] = student
        layouts = {
            "columns first": student.t().contiguous().t(),
            "part of wider rows": padded[:, 3:40],
            "every other row": student.repeat_interleave(2, 0)[::2],
        }
        for name, view in layouts.items():
            apart = labels.repeat_interleave(2)[::2]
            ours = stats_of(view, teacher.t().contiguous().t(), apart, 2.0, 5, 20)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), name
        one = teacher[:1].expand(6, 37)
        ours = stats_of(student, one, labels, 2.0, 5, 20)
        expected = stats_of(student, one.contiguous(), labels, 2.0, 5, 20)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_result_does_not_depend_on_threads(self, threads):
        student, teacher, labels = inputs(300, 257, torch.float32)
        ours = stats_of(student, teacher, labels, 2.0, 7, 100)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        single = stats_of(student, teacher, labels, 2.0, 7, 100)
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(ours, single, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("V", [2, 64, 65, 130, 1000])
    def test_ties_take_the_lowest_index(self, dtype, V):
        student = torch.zeros(V + 1, V, dtype=dtype)
        for row in range(V):
            student[row, row:] = 1  # the first of the equals is at every place once
        student[V, V // 2] = -0.0  # equal to 0
        _, argmax = stats_of(student)
        assert argmax[0].tolist() == [*range(V), 0]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("T", [1.0, 2.5])
    def test_masked_classes(self, dtype, T):
        student, teacher, labels = inputs(8, 70, dtype)
        labels[:] = 0
        student[:, 3] = teacher[:, 3] = -math.inf  # both
        teacher[1, 5] = student[2, 5] = -math.inf  # one of them: its KL of the other is infinite
        student[3:5, 1:] = teacher[3:5, 1:] = -math.inf  # all but one class
        student[5, 0] = -math.inf  # the label
        arguments = (student, teacher, labels, T, 2, 4)
        stats, argmax = stats_of(*arguments)
        expected, expected_argmax = expected_of(*arguments)
        assert_close(stats, expected, dtype)
        assert torch.equal(argmax, expected_argmax)
        assert not stats.isnan().any()
        forward, reverse = stats[-2:]
        assert forward.isinf().tolist() == [False, False, True, False, False, True, False, False]
        assert reverse.isinf().tolist() == [False, True, False, False, False, False, False, False]
        margin, ce = stats[reference.SIDE.index("margin")], stats[reference.SIDE.index("ce")]
        assert (margin[3:6].tolist(), ce[5]) == ([math.inf, math.inf, -math.inf], math.inf)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("T", [0.01, 1.0, 1e4])
    def test_extremes(self, dtype, T):
        """Logits of 1e4 and temperatures from 0.01 to 10000: nothing overflows."""
        student, teacher, labels = inputs(8, 50, dtype)
        student, teacher = (x * (1e4 / x.abs().max()) for x in (student, teacher))
        stats, argmax = stats_of(student, teacher, labels, T, 10, 20)
        expected, expected_argmax = expected_of(student, teacher, labels, T, 10, 20)
        assert_close(stats, expected, dtype)
        assert torch.equal(argmax, expected_argmax)
        assert stats.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("T", [0.01, 1.0, 1e4])
    def test_equal_logits_have_no_divergence(self, dtype, T):
        student, _, _ = inputs(50, 300, dtype)
        assert (stats_of(student, student.clone(), T=T)[0][-2:] == 0).all()

    @pytest.mark.parametrize("T", [1.0, 30.0])
    def test_no_statistic_leaves_its_range(self, T):
        student, _, labels = inputs(500, 40, torch.float32, scale=10.0)
        teacher = student + 1e-4 * torch.randn_like(student)
        stats, _ = stats_of(student, teacher, labels, T, 0, 40)
        assert (stats[-2:] >= 0).all()
        named = dict(zip(reference.SIDE, stats, strict=False))
        assert all((named[name] >= 0).all() for name in ("max", "label", "entropy", "ce", "mass"))
        assert all((named[name] <= 1).all() for name in ("max", "label", "mass"))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_without_a_softmax(self, dtype):
        """Their floats are NaN, and nobody else's; the other network's own statistics are untouched."""
        student, teacher, labels = inputs(6, 70, dtype)
        clean, _ = stats_of(student, teacher, labels, 2.0, 0, 5)
        student[1, 66] = student[1, 68] = math.nan
        student[2, 7] = math.inf
        student[3] = -math.inf
        teacher[4, 0] = math.nan
        stats, argmax = stats_of(student, teacher, labels, 2.0, 0, 5)
        side = len(reference.SIDE)
        assert stats[:side, 1:4].isnan().all()
        assert stats[side : 2 * side, 4].isnan().all()
        assert stats[-2:, 1:5].isnan().all()
        for rows, columns in [
            (slice(0, side), [0, 4, 5]),
            (slice(side, 2 * side), [0, 1, 2, 3, 5]),
            (slice(2 * side, None), [0, 5]),
        ]:
            assert torch.equal(stats[rows][:, columns], clean[rows][:, columns])
        assert argmax[0, 1:4].tolist() == [66, 7, 0]
        assert argmax[1, 4] == 0
        expected, expected_argmax = expected_of(student, teacher, labels, 2.0, 0, 5)
        assert_close(stats, expected, dtype)
        assert torch.equal(argmax, expected_argmax)

    @pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1, -0x400000 + 1])
    @pytest.mark.parametrize("V", [1, 40])
    def test_every_nan_is_a_nan(self, bits, V):
        """Its low bits must not be taken for an exponent."""
        student, teacher, labels = inputs(2, V, torch.float32)
        student[0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        stats, _ = stats_of(student, teacher, labels, 2.5, 0, V)
        assert stats[:6, 0].isnan().all()
        assert stats[-2:, 0].isnan().all()
        assert not stats[:, 1].isnan().any()

    @pytest.mark.parametrize("ignore", [-100, 2])
    def test_ignored_rows(self, ignore):
        student, teacher, labels = inputs(6, 9, torch.float32)
        labels[:] = torch.tensor([ignore, 1, ignore, 0, 3, 8])
        stats, argmax = stats_of(student, teacher, labels, 2.0, 0, 3, ignore)
        for_all, same = stats_of(student, teacher, labels.clamp(min=0), 2.0, 0, 3)
        assert stats[LABEL_ROWS][:, [0, 2]].isnan().all()
        assert torch.equal(stats[:, [1, 3, 4, 5]], for_all[:, [1, 3, 4, 5]])
        others = [row for row in range(14) if row not in LABEL_ROWS]
        assert torch.equal(stats[others], for_all[others])
        assert torch.equal(argmax, same)

    def test_the_kernel_itself_refuses_what_it_cannot_do(self):
        student, teacher, labels = inputs(3, 4, torch.float32)
        with pytest.raises(RuntimeError, match=r"labels\[1\] is 4, expected 0 <= label < 4 or -100"):
            stats_of(student, teacher, torch.tensor([0, 4, 1]))
        with pytest.raises(RuntimeError, match="shape"):
            stats_of(student, teacher[:2])
        with pytest.raises(RuntimeError, match="dtype"):
            stats_of(student, teacher.double())
        with pytest.raises(RuntimeError, match="int64"):
            stats_of(student, teacher, labels.int())
        with pytest.raises(RuntimeError, match="temperature"):
            stats_of(student, teacher, T=-1.0)
        for first, count in [(-1, 2), (0, 5), (3, 2), (0, -1), (2**62, 2**62)]:
            with pytest.raises(RuntimeError, match="class slice"):
                stats_of(student, teacher, first=first, count=count)

    def test_opcheck(self):
        student, teacher, labels = inputs(4, 6)
        torch.library.opcheck(ops._row_stats, (student, teacher, labels, 2.0, 0, 3, -100))
        torch.library.opcheck(ops._row_stats, (student, None, labels, 2.0, 0, 3, -100))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("T", [1.0, 20.0])
    def test_small_divergences_keep_their_digits(self, dtype, T):
        """A difference of sums would have none left."""
        student = 3 * torch.randn(20, 300, dtype=dtype)
        teacher = student + 1e-3 * torch.randn_like(student)
        ours, expected = stats_of(student, teacher, T=T)[0][-2:], expected_of(student, teacher, T=T)[0][-2:]
        assert expected.max() < 1e-5
        # In float64 it is the reference that has only few digits: the terms are some 1e-16 apart.
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3 if dtype == torch.float32 else 1e-5, atol=0)


@pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here")
def test_offsets_beyond_32_bits():
    """Two rows 2^31 elements apart, in memory that is hardly touched."""
    memory = torch.empty(2**31 + 3000, dtype=torch.bfloat16)
    rows = memory.as_strided((2, 1000), (2**31 + 1000, 1))
    rows.copy_(torch.zeros(2, 1000))
    rows[1, 999] = 5
    stats, argmax = stats_of(rows, rows)
    assert argmax.tolist() == [[0, 999], [0, 999]]
    assert torch.equal(stats[0], stats_of(rows.clone())[0][0])
