"""Influence scores against what they predict: the validation loss after retraining."""

import pytest
import torch

import kdaif_fast
from kdaif_fast import influence_scores
from tests.influence.cases import Regression


def slope_and_correlation(predicted, actual):
    p, a = predicted - predicted.mean(), actual - actual.mean()
    return (p @ a / (p @ p)).item(), (p @ a / (p.norm() * a.norm())).item()


@pytest.fixture(scope="module")
def problem():
    return Regression(decay=0.02)


@pytest.fixture(scope="module")
def phi(problem):
    return influence_scores(problem.model(), problem.batch, problem.val, damping=problem.decay, tol=1e-10)


class TestRetraining:
    """The sign and the scale of phi are what retraining does to the validation loss."""

    def effects(self, problem, change):
        N = len(problem.batch[1])
        ones = torch.ones(N, dtype=torch.float64)
        base = problem.validation_loss(ones)
        rows = ones + change * torch.eye(N, dtype=torch.float64)
        return torch.stack([problem.validation_loss(row) for row in rows]) - base

    def test_more_weight(self, problem, phi):
        """Weight 1 + eps on sample i changes the validation loss by eps phi_i / N."""
        eps = 1e-3
        slope, correlation = slope_and_correlation(phi * eps / len(phi), self.effects(problem, eps))
        assert correlation >= 0.99999
        assert abs(slope - 1) < 0.002

    def test_leaving_one_out(self, problem, phi):
        """Sample i gone changes the validation loss by -phi_i / N."""
        slope, correlation = slope_and_correlation(-phi / len(phi), self.effects(problem, -1.0))
        assert correlation >= 0.999
        assert abs(slope - 1) < 0.02

    def test_all_weights_at_once(self, problem, phi):
        """First order adds up: weights 1 + eps u change the validation loss by eps <phi, u> / N."""
        eps, N = 1e-3, len(phi)
        directions = torch.randn(30, N, dtype=torch.float64)
        ones = torch.ones(N, dtype=torch.float64)
        base = problem.validation_loss(ones)
        actual = torch.stack([problem.validation_loss(ones + eps * u) for u in directions]) - base
        slope, correlation = slope_and_correlation(directions @ phi * eps / N, actual)
        assert correlation >= 0.9999
        assert abs(slope - 1) < 0.01

    def test_weights_find_the_flips_and_help(self, problem, phi):
        order = phi.argsort(descending=True)
        found = problem.flipped[order[: int(problem.flipped.sum())]].double().mean()
        assert found > 3 * problem.flipped.double().mean()  # the top of the list is rich in wrong labels
        w = kdaif_fast.sigmoid_weights(phi)
        reweighted, ones = problem.validation_loss(w), torch.ones_like(w)
        assert reweighted < problem.validation_loss(ones)
        assert problem.validation_loss(2 - w) > problem.validation_loss(ones)  # the other sign would harm
        assert w[order[0]] < 1 < w[order[-1]]

    def test_scores_sum_to_zero_at_the_unregularised_optimum(self):
        problem = Regression(decay=0.0)
        phi = influence_scores(problem.model(), problem.batch, problem.val, damping=1e-9, tol=1e-9)
        assert phi.sum().abs() < 1e-4 * phi.abs().sum()

    def test_hessian_and_gauss_newton_agree_on_a_linear_model(self, problem, phi):
        hessian = influence_scores(
            problem.model(), problem.batch, problem.val, curvature="hessian", damping=problem.decay, tol=1e-10
        )
        torch.testing.assert_close(hessian, phi, rtol=1e-5, atol=1e-8)  # linear model: the same matrix
