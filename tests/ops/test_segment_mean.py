"""segment_mean: against loops, on one tensor and on all of RowStats, and bad input."""

import math

import pytest
import torch

from kdaif_fast.ops import RowStats, row_stats, segment_mean
from tests.ops.row_stats_cases import inputs


def by_loops(values, segments, count, weight):
    means = []
    for segment in range(count):
        rows = [i for i in range(len(segments)) if segments[i] == segment and weight[i] != 0]
        total = sum(float(weight[i]) for i in rows)
        means.append(sum(float(weight[i]) * float(values[i]) for i in rows) / total if total else math.nan)
    return torch.tensor(means, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("weighted", ["no", "float", "bool"])
def test_against_loops(dtype, weighted):
    values = torch.randn(40).to(dtype) if dtype != torch.bool else torch.rand(40) < 0.3
    segments = torch.randint(7, (40,))
    segments[segments == 3] = 4  # an empty segment
    weight = {"no": None, "float": torch.rand(40), "bool": torch.rand(40) < 0.7}[weighted]
    ours = segment_mean(values, segments, 9, weight)
    assert ours.dtype == (torch.float32 if dtype == torch.bool else dtype)
    expected = by_loops(values, segments, 9, torch.ones(40) if weight is None else weight)
    tolerance = {torch.bfloat16: 4e-3, torch.float64: 1e-12}.get(dtype, 1e-6)
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert ours.isnan()[[3, 7, 8]].all()


def test_count_is_found():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert segment_mean(values, torch.tensor([0, 2, 2])).shape == (3,)
    assert segment_mean(values[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert segment_mean(values[:0], torch.zeros(0, dtype=torch.int64), 2).isnan().all()


def test_sums_are_wide():
    """Two million small terms on a large one: float32 would lose them."""
    values = torch.full((2_000_001,), 1e-3)
    values[0] = 1e5
    mean = segment_mean(values, torch.zeros(2_000_001, dtype=torch.int64))
    assert mean.item() == pytest.approx((1e5 + 2000) / 2_000_001, rel=1e-6)


def test_rows_without_weight_are_left_out_even_if_nan():
    student, teacher, labels = inputs(12, 5, torch.float32)
    labels[::3] = -100
    stats = row_stats(student.view(3, 4, 5), teacher.view(3, 4, 5), labels.view(3, 4))
    sequences = torch.arange(3)[:, None].expand(3, 4)
    assert segment_mean(stats.student_ce, sequences).isnan().all()
    ours = segment_mean(stats.student_ce, sequences, weight=labels.view(3, 4) != -100)
    torch.testing.assert_close(ours, stats.student_ce.nanmean(1))


def test_all_of_row_stats():
    student, teacher, labels = inputs(12, 5)
    stats = row_stats(student, teacher, labels)
    means = segment_mean(stats, labels, 5)
    assert isinstance(means, RowStats)
    for name, rows, mean in zip(RowStats._fields, stats, means, strict=True):
        if rows is None or name.endswith("argmax"):
            assert mean is None
        else:
            torch.testing.assert_close(mean, segment_mean(rows, labels, 5), equal_nan=True)
    assert means.agreement.dtype == torch.float32


def test_is_differentiable():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0, 1, 1, 2, 2, 2])
    assert torch.autograd.gradcheck(lambda v, w: segment_mean(v, segments, 3, w), (values, weight))


def test_vmap_and_compile():
    values, segments = torch.randn(4, 6), torch.randint(3, (4, 6))
    expected = torch.stack([segment_mean(v, s, 3) for v, s in zip(values, segments, strict=True)])
    ours = torch.vmap(lambda v, s: segment_mean(v, s, 3))(values, segments)
    torch.testing.assert_close(ours, expected, equal_nan=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda v, s: segment_mean(v, s, 3), fullgraph=True)
    torch.testing.assert_close(compiled(values[0], segments[0]), expected[0], equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, r"values is \[1.0\] \(list\), expected a torch.Tensor"),
        ({"values": torch.zeros(3).long()}, TypeError, "values has dtype torch.int64, expected a floating-point dtype"),
        ({"values": torch.zeros(4)}, ValueError, r"values has shape \(4,\), expected \(3,\) as segments"),
        ({"values": RowStats(torch.zeros(4))}, ValueError, r"values.student_max has shape \(4,\)"),
        ({"segments": [0, 1, 2]}, TypeError, r"segments is \[0, 1, 2\]"),
        ({"segments": torch.zeros(3)}, TypeError, "segments have dtype torch.float32, expected torch.int64"),
        ({"segments": torch.tensor([0, 2, 1])}, ValueError, r"segments\[1\] is 2, expected 0 <= segment < 2"),
        ({"segments": torch.tensor([0, 1, -1])}, ValueError, r"segments\[2\] is -1"),
        ({"segments": torch.tensor([0, 1, -1]), "count": None}, ValueError, r"segments\[2\] is -1"),
        ({"count": -1}, ValueError, "count is -1, expected 0 or more"),
        ({"count": 2.0}, TypeError, r"count is 2.0 \(float\), expected an integer"),
        ({"count": True}, TypeError, "count is True"),
        ({"weight": torch.ones(2)}, ValueError, r"weight has shape \(2,\)"),
        ({"weight": torch.ones(3).long()}, TypeError, "weight has dtype torch.int64"),
    ],
)
def test_message(change, error, message):
    arguments = {"values": torch.zeros(3), "segments": torch.tensor([0, 1, 1]), "count": 2, **change}
    with pytest.raises(error, match="^segment_mean: .*" + message):
        segment_mean(**arguments)
