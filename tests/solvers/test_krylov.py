"""lanczos and arnoldi, which share their Krylov spaces."""

import pytest
import torch

from kdaif_fast.solvers import arnoldi, lanczos
from tests.properties import given, settings, st
from tests.solvers.cases import matrix_of, residuals_of, rows_of, spectrum, system

BOTH = pytest.mark.parametrize("solver", [lanczos, arnoldi])
STARTS = pytest.mark.parametrize("start", ["b", "random"])


@BOTH
@STARTS
@pytest.mark.parametrize("negative", [0, 12])
@pytest.mark.parametrize("K", [None, 3])
def test_exact_with_full_rank(solver, start, negative, K):
    C, b = system(30, 100.0, negative)
    b = b if K is None else torch.randn(K, 30, dtype=torch.float64)
    solution = solver(rows_of(C), b, damping=0.1, tol=1e-8, rank=30, start=start)
    assert solution.converged
    assert (residuals_of(C, solution.x, b, 0.1) <= 1.01e-8).all()
    eigenvalues = solution.details["eigenvalues"]
    shape = (30,) if K is None or start == "random" else (3, 30)
    assert eigenvalues.shape == shape
    torch.testing.assert_close(eigenvalues.reshape(-1, 30)[0].flip(0), torch.linalg.eigvalsh(C), rtol=1e-8, atol=1e-8)
    assert solution.details["asymmetry"] < 1e-10


@BOTH
@pytest.mark.parametrize("outside", ["zero", "damping"])
def test_what_is_outside(solver, outside):
    """The largest eigenvectors, and 0 or 1 / damping beyond them."""
    values = torch.cat([torch.tensor([50.0, -40.0, 30.0]), torch.linspace(-0.1, 0.1, 37)]).double()
    C, b = matrix_of(values), torch.randn(40, dtype=torch.float64)
    solution = solver(rows_of(C), b, damping=2.0, rank=3, steps=25, start="random", outside=outside)
    exact, vectors = torch.linalg.eigh(C)
    kept = exact.abs() > 20
    inverse = torch.where(kept, 1 / (exact + 2.0), 0.5 if outside == "damping" else 0.0)
    torch.testing.assert_close(solution.x, vectors @ (inverse * (vectors.T @ b)), rtol=1e-8, atol=1e-8)
    assert solution.details["rank"] == 3
    assert solution.reason == "rank"
    assert solution.residual == pytest.approx(float(residuals_of(C, solution.x, b, 2.0)))


def test_from_b_is_the_galerkin_solution():
    """After n steps, the one whose residual is orthogonal to the Krylov space: for definite C, that of CG."""
    from kdaif_fast.solvers import cg

    C, b = system(40, 50.0)
    for n in (3, 8):
        expected = cg(rows_of(C), b, damping=0.2, tol=None, max_iter=n).x
        torch.testing.assert_close(lanczos(rows_of(C), b, damping=0.2, rank=n).x, expected, rtol=1e-7, atol=1e-9)


@BOTH
def test_columns_are_single_solves(solver):
    C, _ = system(40, 100.0, 10)
    b = torch.randn(4, 40, dtype=torch.float64)
    b[1] = 0
    b[2] = torch.linalg.eigh(C).eigenvectors[:, 3]  # a space of one dimension
    together = solver(rows_of(C), b, damping=0.3, rank=12, start="b")
    assert together.residual[1] == 0
    assert together.residual[2] < 1e-8
    for k in range(4):
        alone = solver(rows_of(C), b[k], damping=0.3, rank=12, start="b")
        torch.testing.assert_close(together.x[k], alone.x, rtol=1e-6, atol=1e-8)
        assert alone.reason == together.reason[k]


@BOTH
def test_spaces_that_end_early(solver):
    C = matrix_of(torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 9.0] * 5, dtype=torch.float64))
    b = torch.randn(2, 30, dtype=torch.float64)
    solution = solver(rows_of(C), b, tol=1e-9, rank=20, start="b")
    assert solution.converged
    assert solution.iterations < 20
    nothing = solver(lambda V: 0 * V, torch.ones(4), damping=0.5, start="b")
    torch.testing.assert_close(nothing.x, torch.full((4,), 2.0))


@BOTH
def test_singular_parts_are_left_out(solver):
    values = spectrum(20)
    values[4:7] = 0
    C, b = matrix_of(values), torch.randn(20, dtype=torch.float64)
    solution = solver(rows_of(C), b, rank=20, start="b")
    assert (solution.converged, solution.reason) == (False, "singular")
    torch.testing.assert_close(solution.x, torch.linalg.pinv(C, hermitian=True) @ b, rtol=1e-5, atol=1e-6)


def test_float32_bases_stay_orthonormal():
    """Without reorthogonalisation, Ritz values would come twice, and the inverse be wrong."""
    C = matrix_of(torch.logspace(-5, 2, 100, dtype=torch.float64), torch.float32)
    solution = lanczos(rows_of(C), torch.randn(100), damping=0.5, tol=1e-3, rank=100, start="random")
    assert solution.converged
    assert (solution.details["eigenvalues"] > 50).sum() == (torch.linalg.eigvalsh(C.double()) > 50).sum()


def test_arnoldi_sees_what_lanczos_does_not():
    C, b = system(30)
    crooked = C + 0.1 * torch.randn(30, 30, dtype=torch.float64)
    assert arnoldi(rows_of(crooked), b, damping=1.0).details["asymmetry"] > 1e-3
    mean = (crooked + crooked.T) / 2
    expected = torch.linalg.solve(mean + torch.eye(30), b)
    torch.testing.assert_close(arnoldi(rows_of(crooked), b, damping=1.0, rank=30).x, expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(lanczos(rows_of(crooked), b, damping=1.0, rank=30).x, expected, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    K=st.integers(1, 4),
    P=st.integers(1, 20),
    rank=st.integers(1, 25),
    start=st.sampled_from(["b", "random"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(K, P, rank, start, seed):
    torch.manual_seed(seed)
    C, b = matrix_of(torch.linspace(0.5, 5, P, dtype=torch.float64)), torch.randn(K, P, dtype=torch.float64)
    solution = lanczos(rows_of(C), b, damping=0.2, rank=rank, start=start, tol=1e-7)
    torch.testing.assert_close(solution.residual, residuals_of(C, solution.x, b, 0.2), rtol=1e-4, atol=1e-12)
    assert solution.converged or rank < P


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outside": "damping"}, "outside is 'damping', which takes damping > 0"),
        ({"outside": "one"}, "outside is 'one', expected one of 'zero', 'damping'"),
        ({"start": "c"}, "start is 'c', expected one of 'b', 'random'"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_input(solver, change, message):
    with pytest.raises(ValueError, match=f"^{solver.__name__}: {message}"):
        solver(lambda V: V, torch.ones(2), **change)
