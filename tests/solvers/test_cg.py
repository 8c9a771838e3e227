import pytest
import torch

from kdaif_fast.solvers import cg


def system(P=40, condition=100.0, negative=0):
    """A symmetric matrix with known eigenvalues, and a right-hand side."""
    basis = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64)).Q
    values = torch.logspace(0, torch.tensor(condition).log10().item(), P, dtype=torch.float64)
    values[:negative] *= -1
    return basis @ torch.diag(values) @ basis.T, torch.randn(P, dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
def test_solves(damping, tol):
    C, b = system()
    solution = cg(lambda V: V @ C, b, damping=damping, tol=tol)
    true = (b - C @ solution.x - damping * solution.x).norm() / b.norm()
    assert solution.converged
    assert solution.reason == "tolerance"
    assert true <= 1.01 * tol
    assert solution.residual == pytest.approx(true.item(), rel=1e-3, abs=1e-13)
    assert solution.damping == damping


def test_is_exact_after_as_many_steps_as_distinct_eigenvalues():
    C = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0], dtype=torch.float64))
    solution = cg(lambda V: V @ C, torch.ones(5, dtype=torch.float64), tol=1e-12)
    assert solution.iterations == 3


def test_says_when_it_ran_out_of_steps():
    C, b = system(condition=1e6)
    solution = cg(lambda V: V @ C, b, tol=1e-8, max_iter=5)
    assert (solution.converged, solution.reason, solution.iterations) == (False, "max_iter", 5)
    assert solution.residual > 1e-8


def test_a_fixed_number_of_steps():
    C, b = system(condition=10)
    assert cg(lambda V: V @ C, b, tol=None, max_iter=7).iterations == 7
    finished = cg(lambda V: V @ C, b, tol=None, max_iter=300)  # far past an exact solution: no NaN
    torch.testing.assert_close(C @ finished.x, b)


def test_negative_curvature_is_reported_and_harmless():
    C, b = system(negative=20)
    for options in ({"tol": 1e-8}, {"tol": None, "max_iter": 30}):
        solution = cg(lambda V: V @ C, b, **options)
        assert (solution.converged, solution.reason) == (False, "negative curvature")
        assert solution.x.isfinite().all()
    negative = cg(lambda V: -V, b)
    torch.testing.assert_close(negative.x, b)  # nothing could be done: the right-hand side itself
    assert negative.iterations == 1
    assert cg(lambda V: V @ C, b, damping=200.0, tol=1e-8).converged  # enough damping makes it definite


def test_zero_curvature_is_reported_and_harmless():
    nothing = cg(lambda V: 0 * V, torch.ones(3), tol=None, max_iter=5)
    assert nothing.reason == "singular"
    assert torch.equal(nothing.x, torch.ones(3))
    a = torch.randn(30)
    for options in ({"tol": 1e-6}, {"tol": None, "max_iter": 100}):
        solution = cg(lambda V: (V @ a)[:, None] * a, torch.randn(30), **options)  # rank 1
        assert solution.reason in ("singular", "diverged", "negative curvature")
        assert solution.x.isfinite().all()
        assert solution.residual <= 1  # no worse than doing nothing
        assert not solution.converged
    assert cg(lambda V: (V @ a)[:, None] * a, torch.randn(30), damping=0.1, tol=1e-5).converged


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1.0, 1e25])
def test_size_of_the_right_hand_side_does_not_matter(size):
    C, b = system()
    C, b = C.float(), b.float()
    solution = cg(lambda V: V @ C, size * b, tol=1e-4)
    assert solution.converged
    torch.testing.assert_close(solution.x / size, cg(lambda V: V @ C, b, tol=1e-4).x, rtol=1e-2, atol=1e-4)


def test_little_damping_alone_is_solved_in_one_step_and_stays_there():
    b = torch.randn(50)
    solution = cg(lambda V: 0 * V, b, damping=1e-8, tol=None, max_iter=5)
    assert solution.reason == "max_iter"
    torch.testing.assert_close(solution.x, b * 1e8)


def test_zero_right_hand_side():
    solution = cg(lambda V: V, torch.zeros(3))
    assert solution.converged
    assert torch.equal(solution.x, torch.zeros(3))
    assert torch.equal(cg(lambda V: V, torch.zeros(3), tol=None, max_iter=2).x, torch.zeros(3))


def test_leaves_the_right_hand_side_alone():
    C, b = system()
    before = b.clone()
    cg(lambda V: V @ C, b)
    assert torch.equal(b, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(2, 2, 2)}, r"b has shape \(2, 2, 2\)"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": "0"}, "damping is '0'"),
        ({"tol": 0.0}, "tol is 0.0"),
        ({"max_iter": 1.5}, "max_iter is 1.5"),
        ({"tol": 2.0}, "tol is 2.0"),
        ({"max_iter": 0}, "max_iter is 0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cg(lambda V: V, **{"b": torch.ones(2), **change})
