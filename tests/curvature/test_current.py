"""Products of a model that changes, and of models and vectors of kinds that are rare."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdaif_fast.curvature import EKFAC, KFAC, EmpiricalFisher, GaussNewton, Hessian, Identity, MonteCarloFisher

STREAMED = [EmpiricalFisher, GaussNewton, Hessian, MonteCarloFisher]


def network(activation=None):
    return nn.Sequential(nn.Linear(3, 4), activation or nn.Tanh(), nn.Linear(4, 3)).double()


def data():
    return torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


CHANGES = {
    "first layer": lambda model, batch: model[0].weight.mul_(2),
    "last layer": lambda model, batch: model[2].weight.mul_(2),
    "bias": lambda model, batch: model[0].bias.add_(1),
    "memory": lambda model, batch: setattr(model[2].weight, "data", model[2].weight * 2),
    "inputs": lambda model, batch: batch[0].mul_(2),
    "targets": lambda model, batch: batch[1].copy_(batch[1].flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("kind", STREAMED)
def test_products_are_of_the_model_and_the_batch_as_they_are(kind, K, change):
    model, batch = network(), data()
    operator = kind(model, batch)
    V = torch.randn(K, operator.size, dtype=torch.float64)
    operator.matmat(V)
    with torch.no_grad():
        CHANGES[change](model, batch)
    fresh = kind(copy.deepcopy(model), [x.clone() for x in batch])
    torch.testing.assert_close(operator.matmat(V), fresh.matmat(V))


def test_linearisations_of_a_loader_are_made_anew_too():
    model, batch = network(), data()
    operator = GaussNewton(model, [batch, batch], keep_graphs=True)
    v = torch.randn(operator.size, dtype=torch.float64)
    operator.matvec(v)
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(operator.matvec(v), GaussNewton(model, batch).matvec(v))
    kept = operator._kept
    operator.matvec(v)
    assert operator._kept is kept


class Normalised(nn.Module):
    def __init__(self, checkpoints):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.checkpoints = checkpoints

    def part(self, x):
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x):
        return self.last(checkpoint(self.part, x, use_reentrant=False) if self.checkpoints else self.part(x))


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_normalisation_inside_of_checkpoints(kind):
    model, batch = Normalised(True).double(), data()
    plain = Normalised(False).double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(kind(model, batch).dense(), kind(plain, batch).dense())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype))).double())


@pytest.mark.parametrize("kind", [*STREAMED, KFAC, EKFAC, Identity])
def test_parameters_of_several_dtypes(kind):
    model, batch = Mixed(), data()
    operator = kind(model, batch)
    V = torch.randn(2, operator.size, dtype=torch.float64)
    assert operator.dtype == operator.matmat(V).dtype == torch.float64
    expected = kind(copy.deepcopy(model).double(), batch).matmat(V)
    if kind is not MonteCarloFisher:
        torch.testing.assert_close(operator.matmat(V), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", STREAMED)
def test_in_inference_mode(kind):
    model, batch = network(nn.ReLU()), data()
    V = torch.ones(2, 31, dtype=torch.float64)
    expected = kind(model, batch).matmat(V)
    with torch.inference_mode():
        operator = kind(model, batch)
        torch.testing.assert_close(operator.matmat(V.clone()), expected)
        torch.testing.assert_close(operator.matvec(V[0].clone()), expected[0])


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.weight).abs()


@pytest.mark.parametrize("kind", [*STREAMED, KFAC, EKFAC])
def test_complex_parameters_are_refused(kind):
    with pytest.raises(TypeError, match=r"'weight' is torch\.complex128.*view_as_real"):
        kind(Complex(), data())


def test_directions_that_are_none():
    operator = Hessian(network(), data())
    with pytest.raises(TypeError, match=r"direction has dtype torch\.complex64, expected real"):
        operator.matvec(torch.ones(31, dtype=torch.complex64))
    entries = {name: torch.zeros_like(p) for name, p in operator.parameters.items()}
    with pytest.raises(TypeError, match=r"direction\['0.bias'\] is a NoneType, expected a tensor"):
        operator.matvec(entries | {"0.bias": None})
    with pytest.raises(ValueError, match=r"directions\['0.bias'\] has shape \(\), expected \('K', 4\)"):
        operator.matmat(entries | {"0.bias": torch.tensor(1.0)})


def test_a_product_with_the_identity_is_no_view():
    v = torch.ones(31, dtype=torch.float64, requires_grad=True)
    product = Identity(network()).matvec(v)
    assert not product.requires_grad
    product.zero_()
    assert v.sum() == 31
