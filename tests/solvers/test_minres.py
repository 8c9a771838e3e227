import itertools

import pytest
import torch

from kdaif_fast.solvers import minres
from tests.properties import given, settings, st
from tests.solvers.cases import Counting, matrix_of, residuals_of, rows_of, spectrum, system


@pytest.mark.parametrize("negative", [0, 15, 40])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("tol", [1e-2, 1e-8])
def test_solves_indefinite_systems(negative, damping, tol):
    C, b = system(negative=negative)
    solution = minres(rows_of(C), b, damping=damping, tol=tol)
    assert solution.converged
    assert solution.reason == "tolerance"
    assert solution.residual == pytest.approx(float(residuals_of(C, solution.x, b, damping)), rel=1e-6)
    assert solution.residual <= tol
    if tol < 1e-5:
        expected = torch.linalg.solve(C + damping * torch.eye(40), b)
        torch.testing.assert_close(solution.x, expected, rtol=1e-4, atol=1e-6)


def test_residuals_never_grow():
    """What MINRES minimises: the residual after every number of steps is the least of the Krylov space."""
    C, b = system(25, negative=8)
    residuals = [minres(rows_of(C), b, tol=None, max_iter=n).residual for n in range(1, 26)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(residuals))
    krylov, power = [], b
    for n in range(1, 6):
        power = C @ power / (C @ power).norm()
        krylov.append(power)
        images = torch.stack(krylov, 1)
        best = b - images @ torch.linalg.lstsq(images, b[:, None]).solution[:, 0]
        assert residuals[n - 1] == pytest.approx(float(best.norm() / b.norm()), rel=1e-6)


def test_as_scipy():
    import scipy.sparse.linalg

    C, b = system(50, 1e3, negative=20)
    ours = minres(rows_of(C), b, damping=0.1, tol=1e-9)
    theirs, failed = scipy.sparse.linalg.minres(C.numpy(), b.numpy(), shift=-0.1, rtol=1e-13)
    assert not failed
    torch.testing.assert_close(ours.x, torch.from_numpy(theirs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("every_look", [True, False])
def test_columns_are_single_solves(every_look, monkeypatch):
    if not every_look:
        monkeypatch.setattr("kdaif_fast.solvers.looks.LOOKS_EVERY", {})
    C, _ = system(60, 1e3, negative=25)
    b = torch.randn(6, 60, dtype=torch.float64)
    b[1] = C[0] + C[5]
    b[2] = 0
    b[4] *= 1e-9
    together = minres(rows_of(C), b, tol=1e-8)
    assert together.converged
    assert together.details["iterations"][2] == 0
    assert torch.equal(together.x[2], torch.zeros(60, dtype=torch.float64))
    for k in range(6):
        alone = minres(rows_of(C), b[k], tol=1e-8)
        torch.testing.assert_close(together.x[k], alone.x, rtol=1e-5, atol=1e-6 * float(alone.x.abs().max()))
        assert alone.details["iterations"] == pytest.approx(int(together.details["iterations"][k]), rel=0.1)


def test_right_hand_sides_that_are_done_are_not_multiplied():
    C = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
    C[3, 3] = -4
    operator = Counting(C)
    b = torch.eye(100, dtype=torch.float64)[:10]
    b[0] = 1
    solution = minres(operator, b, tol=1e-10)
    assert solution.converged
    assert operator.products == solution.iterations + 1  # one that checks
    assert operator.vectors == 10 + (solution.iterations - 1) + 10


def test_singular_systems():
    values = spectrum(30, negative=10)
    values[5:8] = 0
    C = matrix_of(values)
    b = torch.randn(30, dtype=torch.float64)
    consistent = minres(rows_of(C), b @ C, tol=1e-9)
    assert consistent.converged
    solution = minres(rows_of(C), b, tol=1e-9)
    assert (solution.converged, solution.reason) == (False, "singular")
    least = torch.linalg.lstsq(C, b[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(C @ solution.x, C @ least, rtol=1e-5, atol=1e-6)
    r = b - C @ solution.x
    assert (C @ r).norm() <= 1e-8 * C.norm() * r.norm()  # the nearest iterate, not the one after it
    assert solution.iterations < 100
    narrow = minres(rows_of(C.float()), b.float(), tol=1e-4)
    assert narrow.reason == "singular"
    assert narrow.residual == pytest.approx(solution.residual, rel=0.01)
    assert minres(lambda V: 0 * V, torch.ones(3)).reason == "singular"


def test_says_when_it_ran_out_of_steps():
    C, b = system(condition=1e6, negative=10)
    solution = minres(rows_of(C), b, tol=1e-8, max_iter=5)
    assert (solution.converged, solution.reason, solution.iterations) == (False, "max_iter", 5)
    assert minres(rows_of(C), b, tol=None, max_iter=7).iterations == 7


def test_far_past_an_exact_solution():
    C = matrix_of(torch.tensor([-2.0, 1.0, 1.0, 5.0], dtype=torch.float64))
    for matrix, b in ((C, torch.randn(4, dtype=torch.float64)), (torch.eye(4), torch.ones(4))):
        assert minres(rows_of(matrix), b, tol=None, max_iter=60).residual < 1e-6


def test_float32_says_when_its_digits_are_spent():
    C, b = system(60, 1e3, negative=20)
    assert minres(rows_of(C.float()), b.float(), tol=1e-4).converged
    values = torch.logspace(-7, 0, 60, dtype=torch.float64)
    C = matrix_of(values)
    solution = minres(rows_of(C.float()), b.float(), tol=1e-7, max_iter=3000)
    assert not solution.converged
    assert solution.reason in ("rounding", "singular")
    assert solution.residual == pytest.approx(float(residuals_of(C.float(), solution.x, b)), rel=0.1)


def test_small_and_large_right_hand_sides():
    C, b = system(negative=10)
    for size in (1e-30, 1e30):
        solution = minres(rows_of(C.float()), (size * b).float(), tol=1e-4)
        assert solution.converged


@settings(max_examples=25, deadline=None)
@given(K=st.integers(1, 6), P=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_any_shape(K, P, share, seed):
    torch.manual_seed(seed)
    C, b = matrix_of(spectrum(P, 20.0, int(share * P))), torch.randn(K, P, dtype=torch.float64)
    solution = minres(rows_of(C), b, tol=1e-9)
    assert solution.converged
    assert (residuals_of(C, solution.x, b) <= 1.1e-9).all()
