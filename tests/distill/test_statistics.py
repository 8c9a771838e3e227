import gc
import math
import weakref

import pytest
import torch

from kdaif_fast.distill import statistics as module
from kdaif_fast.distill.statistics import SampleStatistics
from kdaif_fast.influence.weights import score_width
from kdaif_fast.ops import row_stats


def make(reference=None, n=2, **others):
    reference = torch.tensor([3.0, -1.0, 3.0, 0.5]) if reference is None else reference
    return SampleStatistics(torch.arange(n), None, reference, **others)


def test_of_the_reference():
    stats = make()
    assert len(stats) == 2
    assert stats.width() == 4
    assert stats.width("range") == 4
    assert stats.width(0.25) == 0.25
    assert [limit.item() for limit in stats.limits] == [-1, 3]
    assert stats.order.scores.tolist() == [-1, 0.5, 3, 3]
    assert stats.order.positions.tolist() == [1, 3, 0, 2]
    many = torch.randn(1000)
    assert make(many).width("robust") == score_width(many, "robust")
    assert make(torch.tensor([60000.0, -60000.0], dtype=torch.float16)).width() == 120000  # not inf
    assert make(torch.tensor([1.0, math.nan])).width().isnan()
    assert make(torch.tensor([math.nan, 1.0])).order.positions.tolist() == [1, 0]
    assert not make(torch.ones(2, requires_grad=True)).width().requires_grad


def test_all_samples_are_sorted_once_for_all_batches(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "score_width", lambda *args: calls.append(args) or score_width(*args))
    reference = torch.randn(100)
    order = make(reference).order
    assert make(reference).order is order
    assert make(reference).width("robust") == make(reference).width("robust")
    assert len(calls) == 1
    make(reference.clone()).width("robust")
    assert len(calls) == 2  # other memory


def test_what_is_kept_is_current_and_goes_with_the_reference():
    reference = torch.tensor([1.0, 2.0, 3.0])
    assert make(reference).width() == 3
    order = weakref.ref(make(reference).order.scores)
    reference[2] = 5.0
    assert make(reference).width() == 5
    assert make(reference).order.scores[2] == 5
    assert order() is None
    order = weakref.ref(make(reference).order.scores)
    assert order() is not None
    del reference
    gc.collect()
    assert order() is None


def test_in_inference_mode():
    with torch.inference_mode():
        reference = torch.tensor([1.0, 2.0])
        assert make(reference).width() == 2
        reference[1] = 4.0
        width = make(reference).width()
    assert width == 4
    assert not width.is_inference()


def test_predictions_are_computed_when_asked_for():
    calls = []

    def rows():
        calls.append("rows")
        return row_stats(torch.eye(2), None, torch.tensor([0, 0]))

    def losses():
        calls.append("losses")
        return torch.ones(2, requires_grad=True)

    stats = make(rows=rows, losses=losses)
    assert calls == []
    assert stats.rows.student_argmax.tolist() == [0, 1]
    assert stats.rows.student_label is stats.rows.student_label
    assert not stats.losses.requires_grad
    assert stats.losses.tolist() == [1, 1]
    assert calls == ["rows", "losses"]


def test_what_is_not_there():
    stats = make()
    with pytest.raises(ValueError, match=r"row statistics \(stats.rows\), which are not known"):
        _ = stats.rows
    with pytest.raises(ValueError, match=r"training losses \(stats.losses\), which are not known"):
        _ = stats.losses
    with pytest.raises(ValueError, match="given no generator"):
        _ = stats.generator
    with pytest.raises(ValueError, match=r"stats.losses are torch.float32 \(3,\), expected \(2,\)"):
        _ = make(losses=lambda: torch.ones(3)).losses


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": [0, 1]}, TypeError, "indices is a list"),
        ({"indices": torch.ones(2)}, TypeError, r"indices is torch.float32 \(2,\), expected torch.int64"),
        ({"indices": torch.ones(2, 2).long()}, TypeError, r"indices is torch.int64 \(2, 2\)"),
        ({"targets": torch.ones(3)}, ValueError, "targets has 3 entries for 2 samples"),
        ({"reference": None}, TypeError, "reference is a NoneType"),
        ({"reference": torch.ones(2).long()}, TypeError, "reference is torch.int64"),
        ({"reference": torch.ones(2, 1)}, TypeError, r"reference is torch.float32 \(2, 1\)"),
        ({"reference": torch.ones(0)}, ValueError, "reference is empty"),
        ({"generator": 3}, TypeError, "generator is 3, expected a torch.Generator of the CPU"),
        ({"rows": torch.ones(2)}, TypeError, "rows is torch.float32 .* expected a function"),
        ({"losses": 1}, TypeError, "losses is a int"),
    ],
)
def test_bad_input(change, error, message):
    given = {"indices": torch.arange(2), "targets": None, "reference": torch.ones(2), **change}
    with pytest.raises(error, match=message):
        SampleStatistics(**given)
