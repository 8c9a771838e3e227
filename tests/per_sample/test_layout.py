"""Where samples are in a tensor: found from how gradients scale."""

import pytest
import torch

from kdaif_fast.per_sample.layout import Layout, Scattered, find_layouts, find_owners
from tests.properties import given, settings, st

N = 4
EXPONENTS = torch.tensor([0, -3, -1, -4])


def scaled(x, owner_shape):
    return x * torch.exp2(EXPONENTS.double()).view(owner_shape)


@pytest.mark.parametrize(
    ("shape", "view", "expected"),
    [
        ((N, 3, 5), (N, 1, 1), Layout(0)),
        ((3, N, 5), (1, N, 1), Layout(1)),
        ((N, N, 5), (1, N, 1), Layout(1)),  # as long as the batch is large: the values decide, not the shape
        ((N, N, 5), (N, 1, 1), Layout(0)),
        ((3, 5, N), (1, 1, N), Layout(2)),
    ],
)
def test_an_axis_of_samples(shape, view, expected):
    x = torch.randn(shape, dtype=torch.float64)
    assert find_layouts(x, scaled(x, view), EXPONENTS) == [expected]


def test_flattened_positions():
    x = torch.randn(N, 3, 5, dtype=torch.float64)
    y = scaled(x, (N, 1, 1))
    assert find_layouts(x.reshape(-1, 5), y.reshape(-1, 5), EXPONENTS) == [Layout(0)]
    x, y = x.transpose(0, 1).reshape(-1, 5), y.transpose(0, 1).reshape(-1, 5)
    assert find_layouts(x, y, EXPONENTS) == [Layout(0, interleaved=True)]


def test_sums_over_samples_have_no_layout():
    x = torch.randn(N, 3, 5, dtype=torch.float64)
    assert find_layouts(x.sum(0), scaled(x, (N, 1, 1)).sum(0), EXPONENTS) == []
    square = torch.randn(N, N, N, dtype=torch.float64)  # a weight with as many rows and columns as there are samples
    assert find_layouts(square.sum(0), scaled(square, (N, 1, 1)).sum(0), EXPONENTS) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 3))
def test_scattered_rows(owner, width):
    owner = torch.tensor(owner)
    rows = torch.rand(len(owner), width) + 0.1
    bits = [rows * torch.where(owner >> bit & 1 == 1, 0.5, 1.0).unsqueeze(1) for bit in range(3)]
    found = find_owners(rows, bits)
    assert found.tolist() == owner.tolist()
    layout, weights = Scattered(found), torch.rand(6)
    sums = torch.stack([rows[owner == i].sum(0) for i in range(6)])
    torch.testing.assert_close(layout.per_sample(rows, 6).sum(1), sums)
    torch.testing.assert_close(layout.sum_rows(rows, 6), sums)
    torch.testing.assert_close(layout.scale(rows, weights), rows * weights[owner].unsqueeze(1))


def test_rows_of_several_samples_have_no_owner():
    rows = torch.rand(6, 3) + 0.1
    mixed = rows.clone()
    mixed[2, 1] *= 0.5
    assert find_owners(rows, [mixed]) is None


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2))
def test_per_sample_and_scale_agree(samples, times, interleaved, axis):
    layout = Layout(axis, interleaved)
    shape = [2, 3, 2]
    shape[axis] = samples * times
    x, weights = torch.randn(shape), torch.rand(samples)
    assert layout.fits(x.shape, samples)
    first = layout.per_sample(x, samples)
    assert first.shape[:2] == (samples, times)
    expected = first * weights.view(-1, 1, 1, 1)
    torch.testing.assert_close(layout.per_sample(layout.scale(x, weights), samples), expected)
    rows = x.movedim(axis, 0)
    torch.testing.assert_close(layout.sum_rows(rows, samples), first.sum(1))
