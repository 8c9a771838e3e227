import warnings

import pytest
import torch

from kdaif_fast.solvers import SOLVERS, ConvergenceError, ConvergenceWarning, solve
from tests.solvers.cases import Counting, matrix_of, residuals_of, rows_of, spectrum, system

OPTIONS = {"nystrom": {"rank": 40}, "lanczos": {"rank": 40}, "arnoldi": {"rank": 40}, "lissa": {"max_iter": 5000}}


class Parametrised(Counting):
    """An operator over named parameters, with an inverse of its own."""

    parameters = {"weight": torch.zeros(4, 9), "bias": torch.zeros(4)}  # noqa: RUF012
    size, dtype, device = 40, torch.float64, torch.device("cpu")

    def solve(self, b, damping):
        return torch.linalg.solve(self.C + damping * torch.eye(40), b, left=False)


@pytest.fixture
def operator():
    return Parametrised(matrix_of(spectrum(40, 30.0)))


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("K", [None, 3])
def test_every_method(operator, method, K):
    b = torch.randn(40, dtype=torch.float64) if K is None else torch.randn(K, 40, dtype=torch.float64)
    solution = solve(operator, b, method, damping=0.5, tol=1e-6, **OPTIONS.get(method, {}))
    assert solution.converged
    assert solution.x.shape == b.shape
    assert solution.damping == 0.5
    true = residuals_of(operator.C, solution.x, b, 0.5)
    torch.testing.assert_close(torch.as_tensor(solution.residual).double(), true, rtol=1e-3, atol=1e-13)
    assert isinstance(solution.iterations, int)
    if K is None:
        assert isinstance(solution.residual, float)
        assert solution.reason == "tolerance"
    else:
        assert solution.residual.shape == (3,)
        assert solution.residual.dtype == torch.float64
        assert solution.reason == ("tolerance",) * 3


@pytest.mark.parametrize("method", SOLVERS)
def test_zero_right_hand_sides(operator, method):
    b = torch.randn(3, 40, dtype=torch.float64)
    b[1] = 0
    solution = solve(operator, b, method, damping=0.5, **OPTIONS.get(method, {}))
    assert torch.equal(solution.x[1], torch.zeros(40, dtype=torch.float64))
    assert solution.residual[1] == 0
    assert solution.converged
    nothing = solve(operator, torch.zeros(40, dtype=torch.float64), method, damping=0.5, **OPTIONS.get(method, {}))
    assert torch.equal(nothing.x, torch.zeros(40, dtype=torch.float64))
    assert nothing.converged


@pytest.mark.parametrize("method", SOLVERS)
def test_size_of_the_right_hand_side_does_not_matter(method):
    operator = Parametrised(matrix_of(spectrum(40, 30.0), torch.float32))
    b = torch.randn(40)
    expected = solve(operator, b, method, damping=0.5, tol=1e-4, **OPTIONS.get(method, {})).x
    for size in (1e-25, 1e25):
        solution = solve(operator, size * b, method, damping=0.5, tol=1e-4, **OPTIONS.get(method, {}))
        assert solution.converged
        torch.testing.assert_close(solution.x / size, expected, rtol=1e-2, atol=1e-3)


def test_damping_is_automatic(operator):
    solution = solve(operator, torch.randn(40, dtype=torch.float64))
    assert solution.damping == pytest.approx(0.1 * float(operator.C.trace() / 40), rel=0.3)


@pytest.mark.parametrize("K", [None, 2])
def test_dictionaries(operator, K):
    leading = () if K is None else (K,)
    b = {"bias": torch.randn(*leading, 4).double(), "weight": torch.randn(*leading, 4, 9).double()}
    solution = solve(operator, b, damping=0.1, tol=1e-8)
    assert list(solution.x) == ["weight", "bias"]
    assert all(solution.x[name].shape == b[name].shape for name in b)
    rows = torch.cat([b["weight"].reshape(*leading, 36), b["bias"]], -1)
    flat = torch.cat([solution.x["weight"].reshape(*leading, 36), solution.x["bias"]], -1)
    assert torch.equal(flat, solve(operator, rows, damping=0.1, tol=1e-8).x)


GOOD = {"weight": torch.ones(4, 9).double(), "bias": torch.ones(4).double()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias": torch.ones(5)}, ValueError, r"b\['bias'\] has shape \(5,\), expected \(4,\)"),
        (
            {"weight": torch.ones(9, 4)},
            ValueError,
            r"b\['weight'\] has shape \(9, 4\), expected \(4, 9\) or \(K, 4, 9\)",
        ),
        (
            {"weight": torch.ones(2, 4, 9)},
            ValueError,
            r"b\['bias'\] has shape \(4,\), expected \(2, 4\) as b\['weight'\]",
        ),
        ({"head": torch.ones(1)}, ValueError, "'head' is unknown"),
        ({"bias": [1.0]}, TypeError, r"b\['bias'\] is a list"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, r"b\['bias'\] has dtype torch.int64"),
        ({"bias": torch.tensor([1, 2, torch.nan, 4])}, ValueError, r"b\['bias'\] has values that are not finite"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, r"b\['bias'\] is on meta, expected cpu"),
    ],
)
def test_a_wrong_entry_is_named(operator, change, error, message):
    with pytest.raises(error, match="^solve: " + message.replace("^", "") if "unknown" not in message else message):
        solve(operator, GOOD | change, damping=0.1)


def test_a_missing_entry_is_named(operator):
    with pytest.raises(ValueError, match="'bias' is missing"):
        solve(operator, {"weight": GOOD["weight"]}, damping=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "method is 'newton', expected one of 'cg', 'minres'"),
        ({"damping": -0.1}, ValueError, "damping is -0.1, expected a finite number >= 0"),
        ({"damping": "much"}, ValueError, "damping is 'much', expected a number >= 0, or 'auto'"),
        ({"damping": None}, TypeError, "damping is None"),
        ({"tol": 0}, ValueError, "tol is 0, expected a number between 0 and 1"),
        ({"tol": "rank"}, TypeError, "tol is 'rank'"),
        ({"max_iter": 0}, ValueError, "max_iter is 0, expected at least 1"),
        ({"max_iter": 2.0}, TypeError, "max_iter is 2.0"),
        ({"rank": 3}, TypeError, "method 'cg' has no option 'rank', expected one of 'preconditioner', 'stop'"),
        ({"method": "minres", "rank": 3}, TypeError, "method 'minres' has no option 'rank', expected none"),
        ({"b": {"a": torch.ones(2)}}, TypeError, "b is a dictionary, expected a tensor"),
        ({"b": [1.0]}, TypeError, "b is a list"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match="^solve: " + message):
        solve(**{"operator": lambda V: V, "b": torch.ones(2), "damping": 1.0, **change})


SINGULAR = torch.diag(torch.tensor([1.0, 2.0, 0.0])).double()
FAILURES = {
    "max_iter": ("cg", *system(40, 1e6), {"max_iter": 4}, "above tol=0.001.*Raise max_iter or damping"),
    "negative curvature": ("cg", -torch.eye(3).double(), torch.ones(3).double(), {}, "is indefinite.*minres"),
    "singular": ("exact", SINGULAR, torch.ones(3).double(), {}, "too near to singular for torch.float64"),
    "diverged": ("cg", torch.full((3, 3), torch.nan).double(), torch.ones(3).double(), {}, "near to singular"),
    "indefinite preconditioner": (
        "cg", torch.eye(3).double(), torch.ones(3).double(), {"preconditioner": lambda V: -V}, "not positive definite",
    ),
    "rounding": ("cg", system(40, 1e4)[0].float(), torch.ones(40), {"tol": 1e-12}, "no more digits"),
    "rank": ("lanczos", *system(40), {"rank": 3}, "Raise rank"),
    "approximation": ("ekfac", torch.eye(3).double(), torch.ones(3).double(), {}, "own approximation"),
}  # fmt: skip


class Approximation(Counting):
    def solve(self, b, damping):
        return b / 2


@pytest.mark.parametrize("reason", FAILURES)
def test_every_failure_warns_and_strict_raises(reason):
    method, C, b, options, message = FAILURES[reason]
    operator = Approximation(C) if method == "ekfac" else rows_of(C)
    expected = rf"{method} stopped after \d+ products at relative residual .*\({reason}\)"
    with pytest.warns(ConvergenceWarning, match=expected) as warned:
        solution = solve(operator, b, method, damping=0.0, **options)
    assert solution.reason == reason
    assert not solution.converged
    assert warned[0].filename == __file__
    with pytest.warns(ConvergenceWarning, match=message):
        solve(operator, b, method, damping=0.0, **options)
    with pytest.raises(ConvergenceError, match=expected):
        solve(operator, b, method, damping=0.0, strict=True, **options)


def test_how_many_right_hand_sides_failed():
    b = torch.eye(3).double()
    with pytest.warns(ConvergenceWarning, match="for 1 of 3 right-hand sides"):
        solution = solve(rows_of(SINGULAR), b, damping=0.0)
    assert solution.reason == ("tolerance", "tolerance", "singular")


def test_without_a_tolerance_nothing_is_asked():
    C, b = system(40, 1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(rows_of(C), b, damping=0.0, tol=None, max_iter=3, strict=True).reason == "max_iter"
        assert solve(rows_of(C), b, "lanczos", damping=0.0, tol=None, rank=3).reason == "rank"
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        solve(lambda V: -V, b, damping=0.0, tol=None, max_iter=3)


def test_stopped_by_the_caller():
    C, b = system(40, 1e6)
    solution = solve(rows_of(C), b, damping=0.0, strict=True, stop=lambda x: True, stop_every=3)
    assert (solution.reason, solution.iterations, solution.converged) == ("stopped", 3, True)
