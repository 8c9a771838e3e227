"""Triton kernels on tensors with offsets beyond 32 bits: run by test_far_apart.py, with TRITON_INTERPRET=1 set.

The interpreter computes in 32 bits where a GPU does. Rows of row_divergence are in interpreted_row_divergence.py.
"""

import pytest
import torch

from kdaif_fast.triton_kernels import (
    cg_update,
    persample_dot,
    persample_grad,
    persample_norm,
    row_stats,
    weighted_grad,
)
from kdaif_fast.triton_kernels.persample_tiles import product_of
from tests.far import far
from tests.triton_kernels.persample_cases import directions, inputs, weights


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("T", [1, 3])
def test_layers(dimension, T):
    """Samples, positions, features: the last two need wide offsets within a tile."""
    a, b = inputs((2, T, 3), 2, torch.float16)
    v, w = directions(1, 2, 3, torch.float16), weights(2)
    far_a, far_b = far(a, dimension), far(b, dimension)
    pairs = [
        (persample_dot.persample_dot(far_a, far_b, v), persample_dot.persample_dot(a, b, v)),
        (persample_grad.persample_grad(far_a, far_b), persample_grad.persample_grad(a, b)),
        (persample_norm.persample_norm(far_a, far_b), persample_norm.persample_norm(a, b)),
        (weighted_grad.weighted_grad(far_a, far_b, w), weighted_grad.weighted_grad(a, b, w)),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("way", [persample_norm._by_gram, persample_norm._by_gradient])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_both_ways_of_norms(way, dimension):
    a, b = inputs((2, 3, 3), 2, torch.float16)
    far_a, far_b = far(a, dimension), far(b, dimension)
    torch.testing.assert_close(way(far_a, far_b, product_of(far_a, far_b)), way(a, b, product_of(a, b)))


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_directions(dimension):
    a, b = inputs((2, 2, 3), 2, torch.float16)
    v = directions(2, 2, 3, torch.float16)
    torch.testing.assert_close(
        persample_dot.persample_dot(a, b, far(v, dimension)), persample_dot.persample_dot(a, b, v)
    )


def test_weights():
    a, b = inputs((2, 2, 3), 2, torch.float16)
    w = weights(2)
    torch.testing.assert_close(weighted_grad.weighted_grad(a, b, far(w)), weighted_grad.weighted_grad(a, b, w))


@pytest.mark.parametrize("keeps", [False, True])
def test_vectors(keeps):
    x, r, p, Ap, best = torch.randn(5, 2, 7).unbind()
    steps, keep = torch.tensor([0.5, -0.25]), torch.tensor([True, False]) if keeps else None
    near = [x.clone() for x in (x, r, p, Ap, best)]
    apart = [far(x) for x in near]
    results = []
    for vectors in (near, apart):
        results.append(cg_update.cg_update(*vectors[:4], steps, 0.1, vectors[4] if keeps else None, keep))
        results.append(cg_update.cg_dots(*vectors[2:4]))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert all(torch.equal(a, b) for a, b in zip(near, apart, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_statistics():
    student, teacher = torch.randn(2, 2, 9, dtype=torch.float64).half().unbind()
    labels = torch.tensor([3, 8])
    ours = row_stats.row_stats(far(student), far(teacher), labels, 2.0, 2, 4, -100)
    expected = row_stats.row_stats(student, teacher, labels, 2.0, 2, 4, -100)
    assert all(torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(ours, expected, strict=True))
