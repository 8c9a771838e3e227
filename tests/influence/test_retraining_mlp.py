"""Influence of a network against retraining it: a perceptron with weight decay, trained until its gradient is zero."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast import influence_scores
from tests.cases import CLASSES, FEATURES

N, HIDDEN, DECAY = 120, 6, 0.02


class Network:
    """Two layers, N samples with a tenth of wrong labels, and a minimum that Newton's method can follow."""

    def __init__(self):
        torch.manual_seed(3)
        x = torch.randn(N + 60, FEATURES).double()
        y = (x @ torch.randn(FEATURES, CLASSES).double() + 0.5 * x.abs().sum(1, keepdim=True).sin()).argmax(1)
        self.batch, self.val = (x[:N], y[:N].clone()), (x[N:], y[N:])
        self.batch[1][: N // 10] = (self.batch[1][: N // 10] + 1) % CLASSES
        self.model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
        ones = torch.ones(N, dtype=torch.float64)
        self.theta = self.fit(torch.cat([p.detach().flatten() for p in self.model.parameters()]), ones, steps=400)
        nn.utils.vector_to_parameters(self.theta.clone(), self.model.parameters())

    def losses(self, theta, batch):
        first, bias, second, last = theta.split([FEATURES * HIDDEN, HIDDEN, HIDDEN * CLASSES, CLASSES])
        hidden = torch.tanh(batch[0] @ first.view(HIDDEN, FEATURES).T + bias)
        return F.cross_entropy(hidden @ second.view(CLASSES, HIDDEN).T + last, batch[1], reduction="none")

    def objective(self, theta, weight):
        return (weight * self.losses(theta, self.batch)).sum() / N + DECAY / 2 * theta @ theta

    def fit(self, theta, weight, steps=100):
        """The minimum near theta, to a gradient of 1e-12: L-BFGS steps to come near it, then Newton's method."""
        theta = theta.clone().requires_grad_()
        near = torch.optim.LBFGS([theta], max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

        def closure():
            near.zero_grad()
            value = self.objective(theta, weight)
            value.backward()
            return value

        near.step(closure)
        for _ in range(20):
            (gradient,) = torch.autograd.grad(self.objective(theta, weight), theta, create_graph=True)
            if gradient.norm() < 1e-12:
                return theta.detach()
            rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in gradient]
            hessian = torch.stack(rows)
            assert torch.linalg.eigvalsh(hessian)[0] > 0
            theta = (theta - torch.linalg.solve(hessian, gradient)).detach().requires_grad_()
        raise AssertionError("Newton's method did not converge")

    def change(self, index, weight):
        """How the validation loss changes when a sample's weight goes from 1 to this, from the same minimum on."""
        weights = torch.ones(N, dtype=torch.float64)
        weights[index] = weight
        return (self.losses(self.fit(self.theta, weights), self.val) - self.losses(self.theta, self.val)).mean()


@pytest.fixture(scope="module")
def network():
    return Network()


@pytest.fixture(scope="module")
def phi(network):
    return influence_scores(
        network.model, network.batch, network.val, curvature="hessian", damping=DECAY, tol=1e-10, max_iter=2000
    )


def largest(phi, count=20):
    return phi.abs().argsort(descending=True)[:count]


def correlations(predicted, actual):
    """Pearson's and Spearman's."""
    pairs = torch.stack([predicted, actual])
    return torch.corrcoef(pairs)[0, 1].item(), torch.corrcoef(pairs.argsort(1).argsort(1).double())[0, 1].item()


def test_it_is_trained(network):
    accuracy = (network.model(network.val[0]).argmax(1) == network.val[1]).double().mean()
    assert accuracy > 0.75


def test_leaving_one_out(network, phi):
    chosen = largest(phi)
    actual = torch.stack([network.change(int(i), 0.0) for i in chosen])
    pearson, spearman = correlations(-phi[chosen] / N, actual)
    assert spearman >= 0.9
    assert pearson >= 0.9


def test_a_little_more_weight(network, phi):
    """phi / N is the derivative itself: the slope of a small step, not only its order."""
    eps = 1e-4
    chosen = largest(phi)
    actual = torch.stack([network.change(int(i), 1 + eps) for i in chosen]) / eps
    torch.testing.assert_close(phi[chosen] / N, actual, rtol=1e-2, atol=1e-2 * float(actual.abs().max()))
    assert correlations(phi[chosen] / N, actual)[0] >= 0.9999
