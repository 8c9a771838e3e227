"""influence_weights against the naive loop: digits, a three-layer perceptron, 1,000 training and 200 validation images.

Same network, data, damping and tolerance for all; the Hessian is what the naive code solves with, so that is what
"kdaif_fast" solves with too. The Gauss-Newton row is the library's default and has another answer.

As a program, `python benchmarks/bench_influence.py`, it compares influence_scores with other libraries, accuracy too,
on a convolutional network too; see influence_peers.py. `make bench-peers` installs those libraries first.
"""

import functools

import pytest
import torch
from baselines.naive_influence import naive_influence_scores
from torch import nn

from kdaif_fast import influence_weights, sigmoid_weights
from kdaif_fast.demo.data import load_digits

DAMPING, TOL = 1.0, 1e-3  # with 0.1 this Hessian is indefinite, and conjugate gradients end at once


@functools.cache
def problem():
    """A network trained for a few epochs, as influence finds it during training."""
    torch.manual_seed(0)
    data = load_digits(flip=0.2, seed=0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    batch, val = (data.train_x[:1000], data.train_y[:1000]), (data.val_x, data.val_y)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        for index in torch.randperm(1000).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0][index]), batch[1][index]).backward()
            optimizer.step()
    return model, batch, val


def ours(curvature):
    return influence_weights(*problem(), curvature=curvature, damping=DAMPING, tol=TOL)


def naive(batch_size):
    return sigmoid_weights(naive_influence_scores(*problem(), damping=DAMPING, tol=TOL, batch_size=batch_size))


IMPLEMENTATIONS = {
    "kdaif_fast": lambda: ours("hessian"),
    "kdaif_fast, Gauss-Newton": lambda: ours("ggn"),
    "naive, loader batches of 64": lambda: naive(64),
    "naive, Hessian over the whole set at once": lambda: naive(1000),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_influence_weights(measure, name):
    expected, weights = naive(1000), IMPLEMENTATIONS[name]()
    if "Gauss-Newton" not in name:
        assert (weights - expected).norm() < 1e-4 * expected.norm()
    else:
        assert torch.corrcoef(torch.stack([weights, expected]))[0, 1] > 0.9
    measure("influence_weights, digits MLP, N=1000", name, IMPLEMENTATIONS[name])


@pytest.mark.parametrize("name", ["kdaif_fast", "naive, one backward a sample"])
def bench_per_sample_dots(measure, name):
    """The part after the solve alone: N dot products of gradients with one direction."""
    from kdaif_fast.per_sample import per_sample_grad_dots

    model, batch, _ = problem()
    parameters = list(model.parameters())
    direction = {key: torch.ones_like(p) for key, p in model.named_parameters()}

    def loop():
        dots = []
        for x, y in zip(*batch, strict=True):
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(x[None]), y[None]), parameters)
            dots.append(sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True)))
        return torch.stack(dots)

    def fused():
        return per_sample_grad_dots(model, batch, direction)

    torch.testing.assert_close(fused(), loop(), rtol=1e-3, atol=1e-3)
    measure("per_sample_grad_dots, digits MLP, N=1000", name, fused if name == "kdaif_fast" else loop)


if __name__ == "__main__":
    from influence_peers import main

    main()
