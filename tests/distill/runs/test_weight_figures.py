import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from kdaif_fast.distill.runs.weight_figures import BINS, QUANTILES, weight_figures
from tests.properties import given, st

weights_and_flips = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0]) | st.floats(0, 3, width=32), st.booleans()), min_size=1
)


@given(weights_and_flips)
def test_figures_against_numpy_and_sklearn(pairs):
    values, flips = np.array([w for w, _ in pairs]), np.array([flip for _, flip in pairs])
    found = weight_figures(torch.from_numpy(values), torch.from_numpy(flips))
    assert found["mean_weight"] == pytest.approx(values.mean())
    assert found["share_below_1"] == (values < 1).mean()
    histogram = found["weight_histogram"]
    assert len(histogram["edges"]) == BINS + 1
    assert sum(histogram["all"]) == len(values)
    assert sum(histogram["clean"]) == (~flips).sum()
    assert sum(histogram["flipped"]) == flips.sum()
    expected = np.quantile(values, QUANTILES, method="nearest")
    assert found["weight_quantiles"]["all"] == pytest.approx(expected, abs=np.diff(np.sort(values), prepend=0).max())
    assert set(found["weight_quantiles"]["all"]) <= set(values.tolist())
    if 0 < flips.sum() < len(flips):
        assert found["flip_auc"] == pytest.approx(roc_auc_score(flips, -values))
        assert found["flipped_below_1"] == (values[flips] < 1).mean()
        assert found["clean_below_1"] == (values[~flips] < 1).mean()
    else:
        assert "flip_auc" not in found


def test_without_flips_and_with_weights_that_are_no_numbers():
    found = weight_figures(torch.tensor([1.0, float("nan"), float("inf")]))
    assert set(found["weight_histogram"]) == {"edges", "all"}
    assert sum(found["weight_histogram"]["all"]) == 1
    assert np.isnan(found["mean_weight"])


@pytest.mark.parametrize(
    ("weights", "flipped", "message"),
    [
        (torch.ones(0), None, r"shape \(0,\), expected \[N\] with N > 0"),
        (torch.ones(2, 2), None, r"shape \(2, 2\)"),
        (torch.ones(2), torch.ones(2), r"flipped is torch.float32 \(2,\), expected bool \(2,\)"),
        (torch.ones(2), torch.tensor([True]), r"flipped is torch.bool \(1,\)"),
    ],
)
def test_bad_input(weights, flipped, message):
    with pytest.raises(ValueError, match=message):
        weight_figures(weights, flipped)
