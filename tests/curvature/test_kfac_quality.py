"""How near EK-FAC's scores come to the exact damped ones on digits, and what keeps them from coming nearer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast._objective import Objective
from kdaif_fast.curvature import EKFAC
from kdaif_fast.demo.data import load_digits
from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grads

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)),
    "cnn": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
    ),
}


def spearman(a, b):
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])


@pytest.fixture(scope="module", params=MODELS)
def problem(request):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = load_digits(flip=0.1, seed=0)
    batch, val = (data.train_x[:600], data.train_y[:600]), (data.val_x[:200], data.val_y[:200])
    model = MODELS[request.param]()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(8):
        for index in torch.randperm(len(batch[0])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0][index]), batch[1][index]).backward()
            optimizer.step()
    model, batch, val = model.double(), (batch[0].double(), batch[1]), (val[0].double(), val[1])
    return model, batch, Objective(model, val).gradient(), gauss_newton(model, batch)


def gauss_newton(model, batch):
    """[P, P], from the samples' gradients of the columns of a root of the loss's Hessian."""
    p = model(batch[0]).softmax(1).detach()
    total = 0
    for c in range(10):
        column = (F.one_hot(torch.tensor(c), 10) - p) * p[:, c : c + 1].sqrt()
        G = per_sample_grads(model, (batch[0], column), lambda z, u: (z * u).sum(1))
        G = torch.cat([grads.flatten(1) for grads in G.values()], 1)
        total = total + G.T @ G / len(p)
    return total


def test_spearman_with_the_exact_answer(problem):
    model, batch, gradient, exact = problem
    damping = 0.1 * exact.diagonal().mean().item()
    damped = exact + damping * torch.eye(len(exact), dtype=torch.float64)
    sizes = [sum(p.numel() for p in m.parameters()) for m in model if list(m.parameters())]
    blocks = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in sizes))

    def scores(direction):
        return per_sample_grad_dots(model, batch, direction)

    truth = scores(torch.linalg.solve(damped, gradient))
    found = {
        "identity": gradient,
        "layer blocks": torch.linalg.solve(damped * blocks, gradient),
        "ekfac": EKFAC(model, batch, fisher="ggn").solve(gradient, damping),
        "ekfac, drawn": EKFAC(model, batch).solve(gradient, damping),
    }
    reached = {name: spearman(scores(x), truth) for name, x in found.items()}
    assert reached["identity"] + 0.1 < reached["ekfac"] < reached["layer blocks"] < 0.97
    assert abs(reached["ekfac, drawn"] - reached["ekfac"]) < 0.1
