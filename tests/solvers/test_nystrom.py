import pytest
import torch

from kdaif_fast.solvers import nystrom, nystrom_preconditioner
from kdaif_fast.solvers.nystrom import nystrom_sketch
from tests.properties import given, settings, st
from tests.solvers.cases import Counting, matrix_of, residuals_of, rows_of


def low_rank(P=80, rank=10, dtype=torch.float64):
    """Ten eigenvalues, and nothing else."""
    values = torch.zeros(P, dtype=torch.float64)
    values[:rank] = torch.linspace(1, 10, rank)
    return matrix_of(values, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [None, 3])
def test_exact_where_the_rank_suffices(K, dtype):
    C = low_rank(dtype=dtype)
    b = torch.randn(80, dtype=dtype) if K is None else torch.randn(K, 80, dtype=dtype)
    tol = 1e-4 if dtype == torch.float32 else 1e-9
    solution = nystrom(rows_of(C), b, damping=0.1, rank=12, tol=tol)
    assert solution.converged
    assert solution.iterations == 12
    assert (residuals_of(C, solution.x, b, 0.1) <= tol).all()
    expected = torch.linalg.solve(C.double() + 0.1 * torch.eye(80).double(), b.double().reshape(-1, 80), left=False)
    torch.testing.assert_close(solution.x.double().reshape(-1, 80), expected, rtol=100 * tol, atol=100 * tol)
    torch.testing.assert_close(
        solution.details["eigenvalues"][:10], torch.linspace(10, 1, 10).double(), rtol=1e-4, atol=1e-4
    )
    assert not solution.details["indefinite"]


def test_says_that_the_rank_does_not_suffice():
    C, b = low_rank(rank=30), torch.randn(80, dtype=torch.float64)
    poor = nystrom(rows_of(C), b, damping=0.1, rank=15)
    assert (poor.converged, poor.reason, poor.details["rank"]) == (False, "rank", 15)
    assert poor.residual == pytest.approx(float(residuals_of(C, poor.x, b, 0.1)))
    assert nystrom(rows_of(C), b, damping=0.1, rank=31).residual < poor.residual / 100
    assert nystrom(rows_of(C), b, damping=0.1, rank=31, max_iter=15).iterations == 15


def test_is_below_the_matrix():
    """What makes it safe: 0 <= N <= C (Frangella et al. 2021, lemma 2.1), and what the formula says it is."""
    C = matrix_of(torch.logspace(-3, 2, 60, dtype=torch.float64))
    sketch = nystrom_sketch(rows_of(C), torch.empty(1, 60, dtype=torch.float64), 20, 0)
    N = sketch.vectors.T * sketch.values @ sketch.vectors
    assert torch.linalg.eigvalsh(C - N)[0] > -1e-10
    assert sketch.values.min() >= 0
    torch.testing.assert_close(sketch.vectors @ sketch.vectors.T, torch.eye(20).double())
    omega = torch.linalg.qr(torch.randn(60, 20, generator=torch.Generator().manual_seed(0)).double()).Q
    y = C @ omega
    torch.testing.assert_close(N, y @ torch.linalg.solve(omega.T @ y, y.T), rtol=1e-8, atol=1e-8)


def test_repeats_with_its_seed():
    C, b = low_rank(rank=30), torch.randn(80, dtype=torch.float64)
    one, other = (nystrom(rows_of(C), b, damping=0.1, rank=10, seed=seed).x for seed in (0, 1))
    assert torch.equal(one, nystrom(rows_of(C), b, damping=0.1, rank=10).x)
    assert not torch.allclose(one, other)


def test_no_curvature_at_all():
    solution = nystrom(lambda V: 0 * V, torch.ones(5), damping=0.5)
    assert solution.converged
    torch.testing.assert_close(solution.x, torch.full((5,), 2.0))
    assert solution.details["rank"] == 0


def test_indefinite_operators_are_named():
    values = torch.linspace(-3, 5, 30, dtype=torch.float64)
    solution = nystrom(rows_of(matrix_of(values)), torch.randn(30, dtype=torch.float64), damping=0.1, rank=20)
    assert solution.details["indefinite"]
    assert not solution.converged
    assert solution.x.isfinite().all()


def test_sketches_in_blocks():
    operator = Counting(low_rank(P=100))
    nystrom(operator, torch.randn(100, dtype=torch.float64), damping=0.1, rank=70)
    assert operator.products == 3 + 1
    assert operator.vectors == 70 + 1


@settings(max_examples=25, deadline=None)
@given(K=st.integers(1, 4), P=st.integers(1, 30), rank=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_shape(K, P, rank, seed):
    torch.manual_seed(seed)
    C, b = matrix_of(torch.linspace(0.5, 5, P, dtype=torch.float64)), torch.randn(K, P, dtype=torch.float64)
    solution = nystrom(rows_of(C), b, damping=0.2, rank=rank, tol=1e-8)
    torch.testing.assert_close(solution.residual, residuals_of(C, solution.x, b, 0.2), rtol=1e-4, atol=1e-12)
    assert solution.converged or rank < P


def test_preconditioner_is_that_of_the_paper():
    C = matrix_of(torch.logspace(-3, 2, 40, dtype=torch.float64))
    like = torch.empty(40, dtype=torch.float64)
    precondition = nystrom_preconditioner(rows_of(C), 10, 0.05, like=like)
    sketch = nystrom_sketch(rows_of(C), like[None], 10, 0)
    U, values = sketch.vectors.T, sketch.values
    P = U @ torch.diag((values + 0.05) / (values[-1] + 0.05)) @ U.T + torch.eye(40) - U @ U.T
    torch.testing.assert_close(precondition(torch.eye(40, dtype=torch.float64)), torch.linalg.inv(P))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nystrom(lambda V: V, torch.ones(2)), "damping is 0, expected > 0"),
        (lambda: nystrom(lambda V: V, torch.ones(2), damping=1.0, rank=0), "rank is 0"),
        (lambda: nystrom_preconditioner(lambda V: V, 3, 0.0), "damping is 0"),
        (lambda: nystrom_preconditioner(lambda V: V, 3, 1.0), "like is None"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match="^nystrom.*: " + message):
        call()
