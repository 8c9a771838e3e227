import math

import numpy as np
import pytest
import torch
from scipy import stats

from kdaif_fast.distill.runs.report.groups import group_weights


def rows(weights, places, flipped=None):
    return {row.name: row for row in group_weights(weights, places, str, flipped)}


def test_against_scipy():
    weights = torch.rand(60, dtype=torch.float64)
    places = torch.arange(60) % 3
    weights[places == 1] -= 0.3
    found = group_weights(weights, places, str)
    assert [row.mean for row in found] == sorted(row.mean for row in found)
    for row in found:
        mine, others = (weights[mask].numpy() for mask in (places == int(row.name), places != int(row.name)))
        assert (row.count, row.mean) == (20, pytest.approx(mine.mean(), abs=1e-6))
        assert row.share_below_1 == (mine < 1).mean()
        assert row.errors == pytest.approx(stats.ttest_ind(mine, others, equal_var=False).statistic)


def test_the_ratio_is_that_of_the_difference_to_the_overall_mean():
    """The variance of mean - overall mean, by drawing: the page says that its standard error is what is used."""
    generator = np.random.default_rng(0)
    N, n = 40, 10
    weights = generator.normal(1, 0.3, (20_000, N))
    weights[:, :n] = generator.normal(0.9, 0.1, (20_000, n))
    differences = weights[:, :n].mean(1) - weights.mean(1)
    ratios = [
        next(
            row for row in group_weights(torch.from_numpy(draw), (torch.arange(N) >= n).long(), str) if row.name == "0"
        )
        for draw in weights[:300]
    ]
    expected = differences.mean() / differences.std()
    assert np.mean([row.errors for row in ratios]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("size", "lower", "spread", "marked"),
    [
        (50, 0.3, 0.1, True),
        (50, 0.02, 0.01, False),  # many standard errors, but hardly lower
        (50, 0.3, 1.5, False),  # much lower, but by chance
        (8, 0.3, 0.1, False),  # too few
        (50, -0.3, 0.1, False),  # weighted up
        (50, 0.3, 0.0, True),
    ],
)
def test_who_is_marked(size, lower, spread, marked):
    generator = torch.Generator().manual_seed(1)
    weights = 1 + spread * torch.randn(500, generator=generator, dtype=torch.float64)
    places = (torch.arange(500) < size).long()
    weights[:size] += -lower - weights[:size].mean() + weights[size:].mean()
    found = rows(weights, places)
    assert found["1"].is_weighted_down is marked
    assert not found["0"].is_weighted_down


def test_chance_marks_hardly_any():
    weights = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2
    found = group_weights(weights, torch.arange(20_000) % 1000, str)
    assert sum(row.is_weighted_down for row in found) <= 5  # 1.35 expected of 1000


def test_flips_explain_a_low_mean():
    weights = torch.tensor([0.2, 1.2, 0.1, 1.1, 0.9, 1.0])
    flipped = torch.tensor([True, False, True, False, False, True])
    found = rows(weights, torch.tensor([0, 0, 0, 1, 1, 2]), flipped)
    assert (found["0"].flipped, found["0"].clean_below_1) == (pytest.approx(2 / 3), 0.0)
    assert (found["1"].flipped, found["1"].clean_below_1) == (0.0, 0.5)
    assert (found["2"].flipped, found["2"].clean_below_1) == (1.0, None)


def test_little_to_go_by():
    assert rows(torch.ones(4), torch.tensor([0, 0, 1, 1]))["0"].errors == 0
    assert rows(torch.tensor([1.0, 1, 2, 2]), torch.tensor([0, 0, 1, 1]))["0"].errors == -math.inf
    assert rows(torch.tensor([1.0, 2, 3]), torch.tensor([0, 1, 1]))["0"].errors is None
    assert rows(torch.tensor([1.0, 2]), torch.tensor([4, 4]))["4"].errors is None
    assert rows(torch.tensor([1.0, math.nan]), torch.tensor([0, 1])).keys() == {"0"}
    assert group_weights(torch.ones(0), torch.ones(0, dtype=torch.int64), str) == []
