"""Products with single batches of a loader, and the Neumann series that is made of them."""

import pytest
import torch

from kdaif_fast.curvature import GaussNewton
from kdaif_fast.solvers import lissa
from tests.cases import make


class Counted(list):
    """A loader that counts the batches it gave."""

    given = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.given += 1
            yield batch


@pytest.fixture
def problem():
    model, (x, y), _ = make("mlp")
    return model, Counted([(x[start : start + 5], y[start : start + 5]) for start in (0, 5, 10)])  # 5, 5 and 2 samples


def test_each_is_of_the_next_batch(problem):
    model, loader = problem
    whole = GaussNewton(model, loader)
    vectors = torch.randn(3, whole.size, dtype=torch.float64)
    for number in (0, 1, 2, 0, 1):
        expected = GaussNewton(model, loader[number]).matmat(vectors)
        torch.testing.assert_close(whole.stochastic(7)(vectors), expected)


def test_one_batch_has_no_parts(problem):
    model, loader = problem
    assert not hasattr(GaussNewton(model, loader[0]), "stochastic")


def test_lissa_takes_a_batch_a_step(problem):
    model, loader = problem
    whole = GaussNewton(model, loader)
    b = torch.randn(whole.size, dtype=torch.float64)
    whole.samples  # noqa: B018  # the pass that looks at all samples
    loader.given = 0
    solution = lissa(whole, b, damping=0.2, tol=None, max_iter=300, scale=2.0, repeats=2)
    # Two runs of 300 steps, and the residual, which is of the whole loader.
    assert 600 <= loader.given <= 606
    assert solution.details["stochastic"]
    exact = torch.linalg.solve(whole.dense() + 0.2 * torch.eye(whole.size, dtype=torch.float64), b)
    without = b / 0.2  # the answer of a matrix of zeros
    assert (solution.x - exact).norm() < 0.3 * (without - exact).norm()


def test_running_sums_of_integers_draw_the_same_labels():
    """In deterministic mode on a GPU they stand in for sums of floats, which torch refuses there."""
    from kdaif_fast.curvature.output_roots import _running_sums_of_integers

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        p = (3 * torch.randn(5, 1000, dtype=dtype)).softmax(1)
        p[0] = torch.eye(1000, dtype=dtype)[7]
        sums = _running_sums_of_integers(p)
        assert sums.dtype == dtype
        torch.testing.assert_close(sums, p.cumsum(1), rtol=0, atol=tolerance)
