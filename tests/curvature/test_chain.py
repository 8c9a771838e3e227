"""Networks whose layers follow one another: products for one vector against PyTorch's engine."""

import pytest
import torch
from torch import nn

from kdaif_fast._objective import Objective
from kdaif_fast.batched import Chain, NotBatchableError, chain

NETWORKS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 3, bias=False)),
    "one layer": lambda: nn.Linear(4, 3),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 4, 3, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),  # windows overlap
        nn.Conv2d(4, 6, 2, groups=2, bias=False),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
}


def batch(samples=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def compare(model, params=None, samples=7):
    """Both products of the chain against double and single backward."""
    objective = Objective(model, batch(samples), params=params)
    inputs = list(objective.parameters.values())
    layers = Chain(objective.outputs, inputs)
    u = torch.randn_like(objective.outputs)
    grads = torch.autograd.grad(objective.outputs, inputs, u, retain_graph=True)
    expected = torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(layers.pull(u), expected, rtol=1e-12, atol=1e-12)
    v = torch.randn_like(expected)
    dummy = torch.zeros_like(u, requires_grad=True)
    pulled = torch.autograd.grad(objective.outputs, inputs, dummy, create_graph=True)
    (tangent,) = torch.autograd.grad(
        torch.cat([g.flatten() for g in pulled]), dummy, v, retain_graph=True, allow_unused=True
    )
    torch.testing.assert_close(layers.push(v), tangent, rtol=1e-12, atol=1e-12)
    assert layers.agrees(1e-8)
    return objective


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [2 << 20, 100], ids=["whole", "chunks"])
def test_products(name, size, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(chain, "CHUNK", size)
    assert compare(NETWORKS[name]().double())._chain is not None


@pytest.mark.parametrize("params", [["0.weight"], ["2"], ["0", "4.weight"]])
def test_some_parameters(params):
    torch.manual_seed(0)
    compare(NETWORKS["perceptron"]().double(), params)


@pytest.mark.parametrize("params", [["4.bias"], ["0.bias", "4.weight"]])
def test_biases_alone_are_left_to_the_engine(params):
    assert Objective(NETWORKS["perceptron"]().double(), batch(), params=params)._chain is None


def test_frozen_parameters():
    torch.manual_seed(0)
    model = NETWORKS["perceptron"]().double()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    compare(model)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x + self.layer(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden * hidden.sigmoid())


@pytest.mark.parametrize("make", [Residual, Twice, Branch])
def test_no_chain(make):
    torch.manual_seed(0)
    objective = Objective(make().double(), batch())
    if make is Residual:  # the sum is of the inputs, which have no graph, with a layer: still not known
        with pytest.raises(NotBatchableError, match="not known"):
            Chain(objective.outputs, list(objective.parameters.values()))
    assert objective._chain is None


def test_hooks_that_change_gradients_are_noticed():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.first(x)
            hidden.register_hook(lambda grad: 2 * grad)
            return self.last(hidden)

    torch.manual_seed(0)
    assert Objective(Hooked().double(), batch())._chain is None


@pytest.mark.parametrize("written", ["weight", "inputs"])
def test_what_was_written_to_is_noticed(written):
    torch.manual_seed(0)
    model = NETWORKS["perceptron"]().double()
    data = batch()
    objective = Objective(model, data)
    v = torch.ones(1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    objective.push(v)
    assert objective._chain is not None
    assert objective.is_current
    with torch.no_grad():
        (model[2].weight if written == "weight" else data[0]).add_(1)
    assert not objective.is_current
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective.push(v)
