import pytest
import torch

from kdaif_fast.solvers import ekfac
from tests.solvers.cases import matrix_of, residuals_of, spectrum


class Inverse:
    """An operator with an inverse of its own."""

    def __init__(self, C):
        self.C = C

    def matmat(self, V):
        return V @ self.C

    def solve(self, b, damping):
        return torch.linalg.solve(self.C + damping * torch.eye(len(self.C)).to(self.C), b, left=False)


class Approximated:
    """A curvature whose approximation has one."""

    def __init__(self, C, near):
        self.C, self.near = C, near

    def matmat(self, V):
        return V @ self.C

    def ekfac(self):
        return Inverse(self.near)


@pytest.mark.parametrize("K", [None, 3])
def test_the_operators_own_inverse(K):
    C = matrix_of(spectrum(20))
    b = 1e-8 * (torch.randn(20) if K is None else torch.randn(K, 20)).double()
    solution = ekfac(Inverse(C), b, damping=0.3, tol=1e-9)
    assert solution.converged
    assert solution.iterations == 0
    assert (residuals_of(C, solution.x, b, 0.3) < 1e-9).all()


def test_that_of_an_approximation():
    C, b = matrix_of(spectrum(20)), torch.randn(20, dtype=torch.float64)
    solution = ekfac(Approximated(C, torch.diag(C.diagonal())), b, damping=0.3)
    assert (solution.converged, solution.reason) == (False, "approximation")
    assert solution.residual == pytest.approx(float(residuals_of(C, solution.x, b, 0.3)))
    torch.testing.assert_close(solution.x, b / (C.diagonal() + 0.3))
    assert solution.details["operator"] == "Inverse"


def test_operators_without_one():
    with pytest.raises(TypeError, match=r"ekfac: operator is a function, expected one with .solve\(b, damping\)"):
        ekfac(lambda V: V, torch.ones(2))


def test_an_inverse_of_another_shape():
    operator = Inverse(torch.eye(2))
    operator.solve = lambda b, damping: b[0]
    with pytest.raises(ValueError, match=r".solve made \(2,\) of vectors \(1, 2\)"):
        ekfac(operator, torch.ones(2))
