import pytest
import torch

from kdaif_fast.solvers import auto_damping
from tests.solvers.cases import matrix_of, rows_of, spectrum


def test_a_tenth_of_the_mean_eigenvalue():
    values = spectrum(400, 10.0)
    damping = auto_damping(rows_of(matrix_of(values)), torch.randn(2, 400, dtype=torch.float64))
    assert damping == pytest.approx(0.1 * float(values.mean()), rel=0.1)


def test_the_operators_own_estimate_is_asked():
    class Operator:
        def matmat(self, V):
            return 2 * V

        def mean_eigenvalue(self, probes):
            assert probes == 4
            return 7.0

    assert auto_damping(Operator(), torch.ones(3)) == pytest.approx(0.7)


def test_no_less_than_float32_can_solve():
    values = torch.zeros(1000)
    values[0] = 1e-3
    b = torch.zeros(1000)
    b[0] = 5
    assert auto_damping(lambda V: V * values, b) == pytest.approx(1e-7, rel=1e-3)  # the mean would be 1e-7 x itself
    values[0] = 0
    assert auto_damping(lambda V: V * values, b) == 1e-12
    assert auto_damping(lambda V: V, torch.zeros(3)) == pytest.approx(0.1)


def test_negative_curvature_has_no_automatic_damping():
    with pytest.raises(ValueError, match=r"damping is 'auto', but the curvature's mean eigenvalue is -2"):
        auto_damping(lambda V: -2 * V, torch.ones(3))
