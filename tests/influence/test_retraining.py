"""Influence scores against what they predict: the validation loss after retraining."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdaif_fast
from kdaif_fast import influence_scores
from tests.cases import CLASSES


class Regression:
    """l2-regularised logistic regression, solved by Newton's method: retraining is exact and cheap."""

    def __init__(self, decay, N=300, features=5, seed=0):
        random = torch.Generator().manual_seed(seed)
        truth = torch.randn(features, CLASSES, generator=random, dtype=torch.float64)

        def draw(n):
            x = torch.randn(n, features, generator=random, dtype=torch.float64)
            noise = torch.rand(n, CLASSES, generator=random, dtype=torch.float64)
            return x, (x @ truth - (-noise.log()).log()).argmax(1)

        self.batch, self.val = draw(N), draw(100)
        flips = torch.randperm(N, generator=random)[: N // 10]
        self.flipped = torch.zeros(N, dtype=torch.bool).index_fill(0, flips, True)
        self.batch[1][flips] = (self.batch[1][flips] + 1) % CLASSES
        self.decay, self.shape = decay, (CLASSES, features)
        self.start = torch.zeros(CLASSES * features, dtype=torch.float64)
        self.start = self.fit(torch.ones(N, dtype=torch.float64))  # near what other weights lead to

    def losses(self, theta, batch):
        return F.cross_entropy(batch[0] @ theta.view(self.shape).T, batch[1], reduction="none")

    def fit(self, weight):
        """Parameters at which the gradient of the weighted, regularised mean loss is below 1e-12."""
        N = len(weight)

        def objective(theta):
            return (weight * self.losses(theta, self.batch)).sum() / N + self.decay / 2 * theta @ theta

        theta = self.start
        for _ in range(50):
            gradient = torch.func.grad(objective)(theta)
            if gradient.norm() < 1e-12:
                return theta
            H = torch.func.jacfwd(torch.func.grad(objective))(theta)
            # Without decay the softmax leaves directions of no curvature; least squares steps across them.
            theta = theta - torch.linalg.lstsq(H, gradient, driver="gelsd").solution
        raise AssertionError("Newton's method did not converge")

    def validation_loss(self, weight):
        return self.losses(self.fit(weight), self.val).mean()

    def model(self):
        model = nn.Linear(self.shape[1], self.shape[0], bias=False, dtype=torch.float64)
        theta = self.fit(torch.ones(len(self.batch[1]), dtype=torch.float64))
        model.weight.data = theta.view(self.shape).clone()
        return model


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
