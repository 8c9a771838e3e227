"""Pieces that the tests of several scores share: loaders, queries by brute force, data with wrong labels."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast.demo.data import load_digits
from tests.cases import CLASSES


def loader(batch, size):
    """A batch cut into a list of batches, the last of them smaller where it does not divide."""
    return list(zip(*(part.split(size) for part in batch), strict=True))


def query_rows(grads, targets, queries):
    """Query gradients [K, P] from those of all samples [N, P]."""
    if queries == "mean":
        return grads.mean(0, keepdim=True)
    if queries == "per_sample":
        return grads
    return torch.stack([grads[targets == c].mean(0) for c in sorted(set(targets.tolist()))])


@functools.cache
def digits():
    """A small network after a few epochs on digits, a tenth of whose training labels are wrong: model, data."""
    data = load_digits(0.1, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(4):
            for index in torch.randperm(len(data.train_y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(data.train_x[index]), data.train_y[index]).backward()
                optimizer.step()
    return model, data


def auc(scores, flags):
    """The chance that a flagged sample has a higher score than another."""
    ranks = scores.double().argsort().argsort().double() + 1
    positive = int(flags.sum())
    return float((ranks[flags].sum() - positive * (positive + 1) / 2) / (positive * (len(flags) - positive)))


class Regression:
    """l2-regularised logistic regression, solved by Newton's method: retraining is exact and cheap."""

    def __init__(self, decay, N=300, features=5, seed=0, flips=0.1):
        random = torch.Generator().manual_seed(seed)
        truth = torch.randn(features, CLASSES, generator=random, dtype=torch.float64)

        def draw(n):
            x = torch.randn(n, features, generator=random, dtype=torch.float64)
            noise = torch.rand(n, CLASSES, generator=random, dtype=torch.float64)
            return x, (x @ truth - (-noise.log()).log()).argmax(1)

        self.batch, self.val = draw(N), draw(100)
        wrong = torch.randperm(N, generator=random)[: round(flips * N)]
        self.flipped = torch.zeros(N, dtype=torch.bool).index_fill(0, wrong, True)
        self.batch[1][wrong] = (self.batch[1][wrong] + 1) % CLASSES
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
