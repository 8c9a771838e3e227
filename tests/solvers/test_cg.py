import pytest
import torch

from kdaif_fast.solvers import cg, nystrom_preconditioner
from tests.properties import given, settings, st
from tests.solvers.cases import Counting, matrix_of, residuals_of, rows_of, spectrum, system


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


@pytest.mark.parametrize("tol", [1e-3, 1e-5, None])
def test_a_residual_that_rounding_has_made_up_is_not_believed(tol):
    values = torch.cat([torch.ones(10), torch.linspace(1, 2, 190) * 1e-6]).double()
    C, b = matrix_of(values, torch.float32), torch.randn(3, 200)
    solution = cg(rows_of(C), b, tol=tol, max_iter=40)
    true = residuals_of(C, solution.x, b)
    assert (true > 5e-3).all()  # what float32 can do here; the recurrence believes in 1e-5 and less
    torch.testing.assert_close(solution.residual, true, rtol=1, atol=0)
    assert not solution.converged


def test_goes_on_from_the_true_residual_where_that_helps():
    C, b = matrix_of(spectrum(100, 1e4), torch.float32), torch.randn(8, 100)
    solution = cg(rows_of(C), b, tol=1e-3, max_iter=2000)
    assert solution.converged
    assert (residuals_of(C, solution.x, b) <= 1.2e-3).all()


def test_right_hand_sides_in_any_layout():
    C, b = matrix_of(spectrum()), torch.randn(40, 4, dtype=torch.float64)
    torch.testing.assert_close(cg(rows_of(C), b.T).x, cg(rows_of(C), b.T.contiguous()).x)


@pytest.mark.usefixtures("device")
def test_a_fixed_number_of_steps():
    C, b = system(condition=10)
    assert cg(lambda V: V @ C, b, tol=None, max_iter=7).iterations == 7
    finished = cg(lambda V: V @ C, b, tol=None, max_iter=300)  # far past an exact solution: no NaN
    torch.testing.assert_close(C @ finished.x, b)


@pytest.mark.usefixtures("device")
def test_negative_curvature_is_reported_and_harmless():
    C, b = system(negative=20)
    for options in ({"tol": 1e-8}, {"tol": None, "max_iter": 30}):
        solution = cg(lambda V: V @ C, b, **options)
        assert (solution.converged, solution.reason) == (False, "negative curvature")
        assert solution.x.isfinite().all()
    negative = cg(lambda V: -V, b)
    torch.testing.assert_close(negative.x, b)  # nothing could be done: the right-hand side itself
    assert negative.details["iterations"] == 1
    assert cg(lambda V: V @ C, b, damping=200.0, tol=1e-8).converged  # enough damping makes it definite


@pytest.mark.usefixtures("device")
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


@pytest.mark.usefixtures("device")
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


@pytest.fixture(params=["as on the CPU", "as on a GPU"])
def device(request, monkeypatch):
    """Looks at every iteration and scalars in NumPy; or looks at every tenth and scalars in torch."""
    if request.param == "as on a GPU":
        monkeypatch.setattr("kdaif_fast.solvers.looks.LOOKS_EVERY", {})
        monkeypatch.setattr("kdaif_fast.solvers.cg_columns.scalars_for", lambda device: torch)


@pytest.mark.usefixtures("device")
def test_columns_are_single_solves():
    """Of different difficulty, so that some are done early."""
    C, _ = system(60, 1e4)
    b = torch.randn(7, 60, dtype=torch.float64)
    b[1] = C[0] + C[5]
    b[2] = 0
    b[4] *= 1e-9
    b[5] = b[5] @ torch.linalg.matrix_power(C, 3)
    together = cg(rows_of(C), b, damping=0.1, tol=1e-8)
    assert together.converged
    assert together.reason == ("tolerance",) * 7
    assert together.residual.dtype == torch.float64
    assert together.details["iterations"][2] == 0
    for k in range(7):
        alone = cg(rows_of(C), b[k], damping=0.1, tol=1e-8)
        torch.testing.assert_close(together.x[k], alone.x, rtol=1e-5, atol=1e-6 * float(alone.x.abs().max()))
        assert alone.details["iterations"] == pytest.approx(int(together.details["iterations"][k]), rel=0.1)
    assert len(set(together.details["iterations"].tolist())) > 3
    torch.testing.assert_close(
        together.residual[[0, 1, 3, 4, 5, 6]], residuals_of(C, together.x, b, 0.1)[[0, 1, 3, 4, 5, 6]]
    )
    assert together.residual[2] == 0


def test_right_hand_sides_that_are_done_are_not_multiplied():
    C = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
    operator = Counting(C)
    b = torch.eye(100, dtype=torch.float64)[:10]  # eigenvectors: done at once
    b[0] = 1
    solution = cg(operator, b, tol=1e-10)
    assert solution.converged
    assert operator.products == solution.iterations
    assert operator.vectors == 10 + (solution.iterations - 1)


def test_float32_reaches_what_float32_can():
    C, b = system(60, 1e3)
    solution = cg(rows_of(C.float()), b.float(), tol=1e-4)
    assert solution.converged
    assert residuals_of(C.float(), solution.x, b) < 1.01e-4
    nothing_left = cg(rows_of(C.float()), b.float(), tol=1e-12, max_iter=1000)
    assert nothing_left.reason in ("rounding", "tolerance")
    assert nothing_left.iterations < 1000


def test_as_scipy():
    import scipy.sparse.linalg

    C, b = system(50, 1e3)
    ours = cg(rows_of(C), b, tol=1e-9)
    theirs, failed = scipy.sparse.linalg.cg(C.numpy(), b.numpy(), rtol=1e-9)
    assert not failed
    torch.testing.assert_close(ours.x, torch.from_numpy(theirs), rtol=1e-6, atol=1e-8)


def test_badly_scaled():
    C, b = system(30, 10.0)
    scale = torch.logspace(-1.5, 1.5, 30, dtype=torch.float64)
    C = scale[:, None] * C * scale
    plain = cg(rows_of(C), b, tol=1e-6, max_iter=60)
    jacobi = cg(rows_of(C), b, tol=1e-6, max_iter=60, preconditioner=lambda V: V / C.diagonal())
    assert jacobi.converged
    assert not plain.converged
    assert residuals_of(C, jacobi.x, b) <= 1.01e-6


@pytest.mark.parametrize("K", [None, 3])
def test_preconditioner_lowers_iterations(K):
    """30 large eigenvalues over a flat rest, as networks have: the sketch takes them away."""
    C = matrix_of(torch.cat([torch.logspace(0, 4, 30, dtype=torch.float64), torch.full((170,), 1e-3).double()]))
    b = torch.randn(200, dtype=torch.float64) if K is None else torch.randn(K, 200, dtype=torch.float64)
    plain = cg(rows_of(C), b, damping=0.01, tol=1e-6, max_iter=2000)
    preconditioner = nystrom_preconditioner(rows_of(C), 40, 0.01, like=torch.empty(200, dtype=torch.float64))
    fast = cg(rows_of(C), b, damping=0.01, tol=1e-6, preconditioner=preconditioner)
    assert plain.converged
    assert fast.converged
    assert fast.iterations < plain.iterations / 3
    assert residuals_of(C, fast.x, b, 0.01).max() <= 1.01e-6


def test_preconditioner_with_solve():
    C, b = system(40, 1e4)

    class Inverse:
        def solve(self, rows, damping):
            return torch.linalg.solve(C + damping * torch.eye(40), rows, left=False)

    solution = cg(rows_of(C), b, damping=0.5, tol=1e-8, preconditioner=Inverse())
    assert solution.iterations == 1
    assert solution.converged


@pytest.mark.usefixtures("device")
def test_indefinite_preconditioner_is_reported():
    C, b = system()
    for V in (b, torch.stack([b, 2 * b])):
        solution = cg(rows_of(C), V, preconditioner=lambda V: -V)
        assert not solution.converged
        assert set([solution.reason] if V is b else solution.reason) == {"indefinite preconditioner"}
        assert torch.equal(solution.x, torch.zeros_like(V))


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (3, TypeError, "preconditioner is a int"),
        (lambda V: V[0], ValueError, r"preconditioner made \(40,\) of vectors \(1, 40\)"),
    ],
)
def test_bad_preconditioner(preconditioner, error, message):
    C, b = system()
    with pytest.raises(error, match=message):
        cg(rows_of(C), b, preconditioner=preconditioner)


@pytest.mark.usefixtures("device")
def test_stop():
    C, b = system(60, 1e5)
    seen = []

    def stop(x):
        seen.append(x)
        return len(seen) == 3

    b = torch.stack([b, 1e6 * b, C[0]])
    solution = cg(rows_of(C), b, tol=1e-12, stop=stop, stop_every=4)
    assert solution.iterations == 12
    assert solution.converged
    assert "stopped" in solution.reason
    assert set(solution.reason) <= {"stopped", "tolerance"}
    assert all(x.shape == (3, 60) for x in seen)
    assert torch.equal(seen[-1], solution.x)  # all right-hand sides, in their units, also those that are done
    assert not cg(rows_of(C), b, tol=1e-12, max_iter=8, stop=lambda x: False).converged


@pytest.mark.usefixtures("device")
def test_mixed_fates():
    """Every right-hand side has a reason of its own."""
    C = torch.diag(torch.tensor([1.0, 3.0, 10.0, -2.0, 0.0], dtype=torch.float64))
    b = torch.eye(5, dtype=torch.float64)
    b[2, :2] = 1
    solution = cg(rows_of(C), b, tol=1e-8, max_iter=2)
    assert solution.reason == ("tolerance", "tolerance", "max_iter", "negative curvature", "singular")
    assert not solution.converged
    torch.testing.assert_close(solution.residual[[3, 4]], torch.tensor([3.0, 1.0]).double())  # of x = b, as it is
    torch.testing.assert_close(solution.residual, residuals_of(C, solution.x, b))
    torch.testing.assert_close(solution.x[3], b[3])
    assert solution.details["lowest_curvature"][3] == -2


def test_divergence_ends_with_the_best_iterate():
    """Products that are not those of a symmetric matrix: residuals grow without end."""
    C = torch.eye(40) + 0.8 * torch.randn(40, 40).triu(1)
    fates = {}
    for seed in range(30):
        b = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        solution = cg(rows_of(C), b, tol=1e-6, max_iter=3000)
        assert solution.x.isfinite().all()
        assert solution.residual == pytest.approx(float(residuals_of(C, solution.x, b)), rel=1e-3, abs=1e-5)
        fates.setdefault(solution.reason, []).append(solution)
    assert all(solution.residual <= 1 for solution in fates["diverged"])
    assert not any(solution.converged for solution in fates["diverged"])
    assert cg(lambda V: V * torch.nan, torch.ones(4)).reason == "diverged"
    assert torch.equal(cg(lambda V: V * torch.nan, torch.ones(4)).x, torch.zeros(4))


@pytest.mark.usefixtures("device")
def test_what_goes_wrong_late_ends_with_the_best_iterate():
    """A residual that goes up and down, then a direction of negative curvature."""
    values = torch.logspace(0, 3, 40, dtype=torch.float64)
    values[20] = -0.5
    C, b = matrix_of(values), torch.randn(3, 40, dtype=torch.float64)
    solution = cg(rows_of(C), b, tol=1e-10)
    assert set(solution.reason) == {"negative curvature"}
    torch.testing.assert_close(solution.residual, residuals_of(C, solution.x, b), rtol=1e-6, atol=0)
    for k in range(3):
        steps = int(solution.details["iterations"][k])
        assert steps > 5
        runs = [cg(rows_of(C), b[k], tol=None, max_iter=n) for n in range(1, steps)]
        least = min(float(residuals_of(C, run.x, b[k])) for run in runs)
        assert solution.residual[k] == pytest.approx(least, rel=1e-6)
        assert least < 1


def test_singular_but_consistent():
    values = spectrum(30)
    values[:10] = 0
    C = matrix_of(values)
    b = torch.randn(30, dtype=torch.float64) @ C
    assert cg(rows_of(C), b, tol=1e-8).converged


@settings(max_examples=25, deadline=None)
@given(K=st.integers(1, 6), P=st.integers(1, 30), damping=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**31))
def test_any_shape(K, P, damping, seed):
    torch.manual_seed(seed)
    C, b = matrix_of(spectrum(P, 50.0)), torch.randn(K, P, dtype=torch.float64)
    solution = cg(rows_of(C), b, damping=damping, tol=1e-9)
    assert solution.converged
    assert (residuals_of(C, solution.x, b, damping) <= 1.1e-9).all()


class OnlyMatvec:
    def matvec(self, v):
        return 2 * v


def test_operators_with_products_of_single_vectors():
    b = torch.randn(3, 4)
    torch.testing.assert_close(cg(OnlyMatvec(), b, tol=1e-6).x, b / 2)


def test_one_look_in_ten_elsewhere(monkeypatch):
    """Where looking means waiting, the solve ends at a multiple of ten, with the same solution."""
    C, b = system(40, 30)
    expected = cg(rows_of(C), b, tol=1e-6)
    monkeypatch.setattr("kdaif_fast.solvers.looks.LOOKS_EVERY", {})
    solution = cg(rows_of(C), b, tol=1e-6)
    assert solution.iterations % 10 == 0
    assert torch.equal(solution.x, expected.x)
    assert solution.details["iterations"] == expected.iterations


@pytest.mark.parametrize(
    ("operator", "b", "error", "message"),
    [
        (3, torch.ones(2), TypeError, "operator is a int, expected an object with .matmat"),
        (lambda V: V[0], torch.ones(2), ValueError, r"made \(2,\) of vectors \(1, 2\)"),
        (lambda V: None, torch.ones(2), ValueError, "made NoneType"),
        (lambda V: V, [1.0], TypeError, "b is a list"),
        (lambda V: V, torch.ones(2, dtype=torch.int64), TypeError, "b has dtype torch.int64"),
        (lambda V: V, torch.ones(0), ValueError, r"b has shape \(0,\)"),
        (
            lambda V: V,
            torch.tensor([[1.0, 2.0], [1.0, torch.inf]]),
            ValueError,
            r"b\[1\] has values that are not finite",
        ),
    ],
)
def test_bad_system(operator, b, error, message):
    with pytest.raises(error, match="^cg: .*" + message):
        cg(operator, b)


def test_operator_of_another_size():
    operator = Counting(torch.eye(3))
    operator.size = 3
    with pytest.raises(ValueError, match=r"b has shape \(2,\), expected \(3,\) or \(K, 3\)"):
        cg(operator, torch.ones(2))
