import pytest
import torch

from kdaif_fast.solvers import exact
from tests.properties import given, settings, st
from tests.solvers.cases import Counting, matrix_of, residuals_of, rows_of, spectrum, system


@pytest.mark.parametrize("K", [None, 3])
@pytest.mark.parametrize(("negative", "factorisation"), [(0, "cholesky"), (15, "eigenvalues")])
def test_solves(negative, factorisation, K):
    C, b = system(negative=negative)
    b = b if K is None else torch.randn(K, 40, dtype=torch.float64)
    solution = exact(rows_of(C), b, damping=0.25, tol=1e-12)
    assert solution.converged
    assert (residuals_of(C, solution.x, b, 0.25) <= 1e-12).all()
    assert solution.details["factorisation"] == factorisation
    assert solution.iterations == 40
    if negative:
        torch.testing.assert_close(solution.details["eigenvalues"], torch.linalg.eigvalsh(C) + 0.25)


def test_badly_conditioned_float32():
    """The matrix is float32's, the solution float64's."""
    C = matrix_of(torch.logspace(-5, 0, 40, dtype=torch.float64), torch.float32)
    b = torch.randn(40)
    solution = exact(rows_of(C), b, damping=1e-4)
    symmetric = (C.double() + C.double().T) / 2
    expected = torch.linalg.solve(symmetric + 1e-4 * torch.eye(40), b.double())
    torch.testing.assert_close(solution.x.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert solution.x.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular(dtype):
    values = spectrum(30)
    values[5:9] = 0
    C = matrix_of(values, dtype)
    b = torch.randn(30, dtype=dtype)
    solution = exact(rows_of(C), b)
    assert (solution.converged, solution.reason) == (False, "singular")
    assert solution.details["left_out"] == 4
    expected = torch.linalg.pinv(matrix_of(values) * 0 + C.double(), hermitian=True, rtol=1e-5) @ b.double()
    torch.testing.assert_close(solution.x.double(), expected, rtol=1e-3, atol=1e-4)
    assert exact(rows_of(C), b @ C).converged


def test_tolerances_beyond_rounding():
    C, b = system(40, 1e6)
    solution = exact(rows_of(C.float()), b.float(), tol=1e-12)
    assert (solution.converged, solution.reason) == (False, "rounding")


def test_products_come_in_blocks_or_at_once():
    operator = Counting(system(150)[0])
    exact(operator, torch.randn(150, dtype=torch.float64))
    assert operator.products == 3 + 1
    operator.dense = lambda: operator.C
    exact(operator, torch.randn(150, dtype=torch.float64))
    assert operator.products == 4 + 1
    operator.dense = lambda: operator.C[:3]
    with pytest.raises(ValueError, match=r"the operator's .dense\(\) is \(3, 150\), expected \(150, 150\) as b"):
        exact(operator, torch.randn(150, dtype=torch.float64))


def test_asymmetry_is_reported():
    C, b = system()
    assert exact(rows_of(C), b).details["asymmetry"] < 1e-14
    C[0, 5] += 1
    assert exact(rows_of(C), b).details["asymmetry"] > 1e-4


def test_too_large():
    def no_product(V):
        raise AssertionError

    with pytest.raises(ValueError, match=r"P is 20,001 parameters, .* take 9\.6 GB; expected at most max_size=20,000"):
        exact(no_product, torch.ones(20_001))
    with pytest.raises(ValueError, match=r"P is 11 .*max_size=10"):
        exact(no_product, torch.ones(11), max_size=10)
    with pytest.raises(ValueError, match="max_size is 0"):
        exact(no_product, torch.ones(11), max_size=0)


@settings(max_examples=25, deadline=None)
@given(K=st.integers(1, 4), P=st.integers(1, 80), negative=st.booleans(), seed=st.integers(0, 2**31))
def test_any_shape(K, P, negative, seed):
    torch.manual_seed(seed)
    C, b = matrix_of(spectrum(P, 50.0, P // 2 if negative else 0)), torch.randn(K, P, dtype=torch.float64)
    assert exact(rows_of(C), b, tol=1e-10).converged
