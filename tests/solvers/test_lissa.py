import pytest
import torch

from kdaif_fast.solvers import ConvergenceError, lissa
from kdaif_fast.solvers.largest_eigenvalue import largest_eigenvalue
from tests.solvers.cases import matrix_of, residuals_of, rows_of, spectrum, system


class Batches:
    """The mean of several matrices, of which one is drawn at random."""

    def __init__(self, noise=0.3, batches=8, P=20):
        mean = matrix_of(spectrum(P, 10.0))
        parts = torch.stack([matrix_of(noise * torch.rand(P, dtype=torch.float64)) for _ in range(batches)])
        self.parts = mean + parts
        self.C = self.parts.mean(0)
        self.seeds = []

    def matmat(self, V):
        return V @ self.C

    def stochastic(self, seed):
        self.seeds.append(seed)
        generator = torch.Generator().manual_seed(seed)
        part = self.parts[int(torch.randint(len(self.parts), (), generator=generator))]
        return lambda V: V @ part


@pytest.mark.parametrize("K", [None, 3])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_exact_products(K, damping):
    C, b = system(20, 10.0)
    b = b if K is None else torch.randn(K, 20, dtype=torch.float64)
    solution = lissa(rows_of(C), b, damping=damping, tol=1e-7)
    assert solution.converged
    assert solution.details["attempts"] == 1
    assert not solution.details["stochastic"]
    assert (residuals_of(C, solution.x, b, damping) <= 1.01e-7).all()
    assert solution.details["scale"] == pytest.approx(1.1 * (10 + damping), rel=0.1)


def test_is_the_series():
    C, b = system(6, 5.0)
    solution = lissa(rows_of(C), b, damping=0.2, tol=None, max_iter=4, scale=8.0)
    G = torch.eye(6) - (C + 0.2 * torch.eye(6)) / 8.0
    series = sum(torch.linalg.matrix_power(G, j) for j in range(4)) / 8.0
    torch.testing.assert_close(solution.x, series @ b)
    assert (solution.reason, solution.iterations) == ("max_iter", 4)


def test_stochastic_products_and_repeats():
    operator = Batches()
    b = torch.randn(2, 20, dtype=torch.float64)
    one = lissa(operator, b, damping=0.1, tol=0.2, max_iter=200)
    assert one.details["stochastic"]
    assert one.converged
    torch.testing.assert_close(one.residual, residuals_of(operator.C, one.x, b, 0.1))
    operator.seeds.clear()
    many = lissa(operator, b, damping=0.1, tol=0.2, max_iter=200, repeats=16)
    assert len(set(operator.seeds)) == 16 * 200  # no batch order twice
    alone = [lissa(operator, b, damping=0.1, tol=0.2, max_iter=200, seed=1000 * k).residual.norm() for k in range(4)]
    assert many.residual.norm() < 0.6 * sum(alone) / 4  # 1/4 but for chance
    assert 0 < many.details["spread"] < 0.5
    assert torch.equal(many.x, lissa(operator, b, damping=0.1, tol=0.2, max_iter=200, repeats=16).x)
    assert not torch.equal(one.x, lissa(operator, b, damping=0.1, tol=0.2, max_iter=200, seed=7).x)


@pytest.mark.parametrize("operator", [rows_of(torch.diag(torch.linspace(1, 10, 20, dtype=torch.float64))), Batches()])
def test_a_scale_that_is_too_small_is_doubled(operator):
    b = torch.randn(20, dtype=torch.float64)
    solution = lissa(operator, b, tol=0.2, scale=1.0, max_iter=300)
    assert solution.details["attempts"] > 1
    assert solution.details["scale"] == 2.0 ** (solution.details["attempts"] - 1)
    assert solution.details["scale"] > 5
    assert solution.converged


def test_divergence_is_never_returned():
    C, b = system(20, 10.0)
    with pytest.raises(ConvergenceError, match=r"diverges, even with scale 0\.0064 after 6 doublings"):
        lissa(rows_of(C), b, scale=1e-4)
    with pytest.raises(ConvergenceError, match="diverges"):
        lissa(Batches(), b, scale=1e-4)
    with pytest.raises(ConvergenceError):
        lissa(lambda V: V * 1e30, b, scale=1.0)


@pytest.mark.parametrize("lowest", [-20.0, -1.0, -0.05])
def test_indefinite_operators_are_named(lowest):
    values = spectrum(20, 10.0)
    values[0] = lowest
    C, b = matrix_of(values), torch.randn(20, dtype=torch.float64)
    with pytest.raises(ConvergenceError, match=r"indefinite .*minres"):
        lissa(rows_of(C), b, tol=1e-6, max_iter=3000)
    assert lissa(rows_of(C), b, damping=1.2 * abs(lowest), tol=1e-3, max_iter=5000).converged


def test_too_few_steps_are_not_called_converged():
    C, b = system(20, 1e4)
    solution = lissa(rows_of(C), b, max_iter=10)
    assert (solution.converged, solution.reason) == (False, "max_iter")
    assert solution.residual == pytest.approx(float(residuals_of(C, solution.x, b)))


def test_zero_right_hand_side_and_zero_curvature():
    assert torch.equal(lissa(lambda V: V, torch.zeros(3)).x, torch.zeros(3))
    torch.testing.assert_close(lissa(lambda V: 0 * V, torch.ones(3), damping=0.5, tol=1e-5).x, torch.full((3,), 2.0))


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_eigenvalue(sign):
    C, b = system(30, 100.0)
    estimate, products = largest_eigenvalue(rows_of(sign * C), b[None])
    assert estimate == pytest.approx(sign * 100, rel=0.2)
    assert abs(estimate) <= 100 * (1 + 1e-9)
    assert products <= 20
    assert largest_eigenvalue(lambda V: 0 * V, b[None])[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"scale": 0.0}, "scale is 0.0"), ({"scale": "1"}, "scale is '1'"), ({"repeats": 0}, "repeats is 0")],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        lissa(lambda V: V, torch.ones(2), **change)


@pytest.mark.parametrize("tol", [1e-3, None])
def test_a_series_that_rises_after_it_fell_is_not_returned(tol):
    C = torch.diag(torch.tensor([-0.05, 0.5, 1.0], dtype=torch.float64))
    b = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)  # hardly any of it where the curvature is negative
    with pytest.raises(ConvergenceError, match="indefinite"):
        lissa(lambda V: V @ C, b, tol=tol, max_iter=80)  # |r| is still below |b| in the end
