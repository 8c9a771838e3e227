"""Which preconditioner a solve gets, and that scores are the same with any."""

import pytest
import torch
from torch import nn

from kdaif_fast import influence_scores
from kdaif_fast.curvature import EKFAC, KFAC, GaussNewton, Hessian, Identity
from kdaif_fast.influence.preconditioning import choose_preconditioner
from tests.cases import CLASSES, make


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()

    def batch(n):
        return torch.randn(n, 6, dtype=torch.float64), torch.randint(CLASSES, (n,))

    return model, batch(400), batch(9)


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac", "none", "auto", None, lambda rows: rows / 2])
def test_scores_are_the_same_with_any(problem, preconditioner):
    exact = influence_scores(*problem, solver="exact", damping=0.1)
    options = {"preconditioner": preconditioner}
    phi = influence_scores(*problem, damping=0.1, tol=1e-10, solver_options=options)
    torch.testing.assert_close(phi, exact, rtol=1e-6, atol=1e-8)


def test_names(problem):
    model, batch, _ = problem
    curvature = GaussNewton(model, batch)
    assert type(choose_preconditioner("kfac", curvature, False, None)) is KFAC
    assert type(choose_preconditioner("ekfac", curvature, False, None)) is EKFAC
    assert choose_preconditioner("none", curvature, True, None) is None
    assert choose_preconditioner(print, curvature, True, None) is print


def test_automatic_is_for_rough_solves_with_matrices_that_it_is_like(problem):
    model, batch, _ = problem
    curvature = GaussNewton(model, batch)
    assert type(choose_preconditioner("auto", curvature, True, None)) is KFAC
    assert choose_preconditioner("auto", curvature, False, None) is None
    assert choose_preconditioner("auto", Hessian(model, batch), True, None) is None
    assert choose_preconditioner("auto", Identity(model), True, None) is None
    assert choose_preconditioner("auto", curvature, True, 100) is None  # bytes
    wide = nn.Linear(500, CLASSES)
    few = torch.randn(3, 500), torch.randint(CLASSES, (3,))
    assert choose_preconditioner("auto", GaussNewton(wide, few), True, None) is None  # eigenvectors would cost more


def test_a_loss_without_a_curvature_that_can_be_drawn_from(problem, monkeypatch):
    def refuse(self, *_, **__):
        raise ValueError("no root")

    monkeypatch.setattr(KFAC, "mean_eigenvalue", refuse)
    model, batch, _ = problem
    assert choose_preconditioner("auto", GaussNewton(model, batch), True, None) is None


def test_fewer_products_for_a_ranking():
    """Directions of very different curvature: without a preconditioner each takes its iterations."""
    torch.manual_seed(0)
    scales = torch.logspace(-2, 1, 30)
    model = nn.Linear(30, 4)

    def batch(n):
        return torch.randn(n, 30) * scales, torch.randint(4, (n,))

    data, val = batch(600), batch(50)
    counts = {}
    for preconditioner in ("none", "auto"):
        options = {"preconditioner": preconditioner}
        _, solution = influence_scores(
            model, data, val, damping=1e-4, tol=3e-2, solver_options=options, return_solution=True
        )
        assert solution.converged
        counts[preconditioner] = solution.iterations
    assert counts["auto"] < 0.5 * counts["none"]


def test_a_name_that_is_none():
    model, batch, val = make("linear")
    with pytest.raises(ValueError, match=r"solver_options\['preconditioner'\] is 'jacobi', expected one of 'auto'"):
        influence_scores(model, batch, val, solver_options={"preconditioner": "jacobi"})
