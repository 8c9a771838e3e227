"""Self-influence: against materialised gradients and dense matrices."""

import warnings

import pytest
import torch
from torch import nn

from kdaif_fast import ConvergenceWarning, per_sample_grad_norms, self_influence
from kdaif_fast.curvature import EKFAC, EmpiricalFisher, GaussNewton
from tests.cases import MODELS, Dense, make
from tests.influence.cases import auc, digits, loader


def brute_force(grads, matrix, damping):
    matrix = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return (grads * torch.linalg.solve(matrix, grads.T).T).sum(1)


class Inverse:
    """An operator that has nothing but its inverse."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, []

    def solve(self, b, damping):
        self.calls.append(len(b))
        return torch.linalg.solve(self.matrix + damping * torch.eye(len(self.matrix), dtype=b.dtype), b.T).T


@pytest.mark.parametrize("name", MODELS)
def test_identity_is_squared_norms(name):
    model, batch, _ = make(name)
    truth = Dense(model).grads(batch).square().sum(1)
    torch.testing.assert_close(self_influence(model, batch), truth, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(self_influence(model, loader(batch, 5), damping=1.0), truth / 2, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(self_influence(model, batch).sqrt(), per_sample_grad_norms(model, batch))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_conjugate_gradients(name):
    model, batch, other = make(name)
    dense = Dense(model)
    expected = brute_force(dense.grads(batch), dense.gauss_newton(batch), 0.05)
    options = dict(curvature="ggn", damping=0.05, tol=1e-9, max_iter=2000)
    own = self_influence(model, batch, **options)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-9)
    small = 8 * 8 * sum(p.numel() for p in model.parameters()) * 2  # two samples at a time
    again = self_influence(model, loader(batch, 5), memory=small, **options)
    torch.testing.assert_close(again, own, rtol=1e-7, atol=1e-10)
    assert (own >= 0).all()
    elsewhere = self_influence(model, batch, train=other, **options)
    expected = brute_force(dense.grads(batch), dense.gauss_newton(other), 0.05)
    torch.testing.assert_close(elsewhere, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_exact(name):
    model, batch, _ = make(name)
    dense = Dense(model)
    expected = brute_force(dense.grads(batch), dense.gauss_newton(batch), 0.05)
    small = 8 * 8 * sum(p.numel() for p in model.parameters()) * 2
    for data, memory in ((batch, 1 << 28), (loader(batch, 5), small)):
        own = self_influence(model, data, train=batch, curvature="ggn", solver="exact", damping=0.05, memory=memory)
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-12)


def test_an_indefinite_matrix_is_not_factored():
    model, batch, _ = make("mlp")
    assert torch.linalg.eigvalsh(Dense(model).hessian(batch))[0] < -1e-3
    with pytest.raises(ValueError, match=r"the curvature plus damping 0\.001 is not positive definite"):
        self_influence(model, batch, curvature="hessian", solver="exact", damping=1e-3)


def test_hessian():
    model, batch, _ = make("mlp")
    dense = Dense(model)
    matrix = dense.hessian(batch)
    damping = 0.1 + max(0.0, -torch.linalg.eigvalsh(matrix)[0].item())
    own = self_influence(model, batch, curvature="hessian", damping=damping, tol=1e-10, max_iter=2000)
    torch.testing.assert_close(own, brute_force(dense.grads(batch), matrix, damping), rtol=1e-5, atol=1e-8)


def test_operators():
    model, batch, _ = make("conv")
    dense = Dense(model)
    grads = dense.grads(batch)
    fisher = grads.T @ grads / len(grads)
    expected = brute_force(grads, fisher, 0.1)
    operator = EmpiricalFisher(model, batch)
    torch.testing.assert_close(
        self_influence(model, batch, curvature=operator, damping=0.1, tol=1e-11, max_iter=2000), expected
    )
    inverse = Inverse(fisher)
    memory = 8 * 8 * len(fisher) * 5
    own = self_influence(model, batch, curvature=inverse, damping=0.1, memory=memory)
    torch.testing.assert_close(own, expected)
    assert inverse.calls == [5, 5, 2]


def test_ekfac_by_name():
    model, batch, _ = make("mlp")
    operator, grads = EKFAC(model, batch), Dense(model).grads(batch)
    expected = (grads * operator.solve(grads, 0.1)).sum(1)
    own = self_influence(model, loader(batch, 5), train=batch, curvature="ekfac", damping=0.1)
    torch.testing.assert_close(own, expected)
    assert (self_influence(model, batch, curvature=operator) > 0).all()


def test_auto_damping():
    model, batch, _ = make("mlp")
    damping = 0.1 * GaussNewton(model, batch).mean_eigenvalue(probes=4)
    options = dict(curvature="ggn", tol=1e-10, max_iter=2000)
    torch.testing.assert_close(
        self_influence(model, batch, **options), self_influence(model, batch, damping=damping, **options)
    )
    with pytest.raises(ValueError, match="damping is 'auto', but curvature has no matmat"):
        self_influence(model, batch, curvature=Inverse(torch.eye(43)))


def test_parameters():
    model, batch, _ = make("mlp")
    head = Dense(model, ["2.weight", "2.bias"]).grads(batch)
    torch.testing.assert_close(self_influence(model, batch, params="2"), head.square().sum(1))
    operator = GaussNewton(model, batch, params="2")
    with pytest.raises(ValueError, match=r"curvature is over other parameters than params: 0\.bias, 0\.weight"):
        self_influence(model, batch, curvature=operator)


def test_a_solve_that_stops_early_is_told_of():
    model, batch, _ = make("mlp")
    with pytest.warns(ConvergenceWarning, match=r"did not reach tol=1e-08 for 12 samples \(max_iter\)"):
        self_influence(model, batch, curvature="ggn", damping=1e-3, tol=1e-8, max_iter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_influence(model, batch, curvature="ggn", damping=1e-3, tol=None, max_iter=2)


def test_wrong_labels_have_to_be_memorised():
    model, data = digits()
    assert auc(self_influence(model, (data.train_x, data.train_y)), data.flipped) > 0.8


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"curvature": "fisher"}, ValueError, "curvature is 'fisher', expected one of 'ggn'"),
            ({"curvature": 3}, TypeError, "curvature is a int, expected one of 'ggn'"),
            ({"solver": "magic"}, ValueError, "solver is 'magic', expected one of 'cg', 'exact'"),
            ({"damping": -1}, ValueError, "damping is -1"),
            ({"damping": "much"}, TypeError, "damping is 'much'"),
            ({"tol": 7.0}, ValueError, "tol is 7.0"),
            ({"max_iter": 0}, ValueError, "max_iter is 0"),
            ({"memory": 0}, ValueError, "memory is 0"),
            ({"data": []}, ValueError, "data is empty"),
            ({"params": ["3"]}, ValueError, "params contains '3'"),
            (
                {"train": [], "curvature": Inverse(torch.eye(3))},
                ValueError,
                "train is given, but curvature is an operator",
            ),
        ],
    )
    def test_message(self, change, error, message):
        model, batch, _ = make("mlp")
        arguments = {"data": batch, **change}
        with pytest.raises(error, match=message):
            self_influence(model, arguments.pop("data"), **arguments)

    def test_a_gradient_that_is_not_finite(self):
        model = nn.Linear(4, 3).double()
        batch = torch.randn(12, 4).double(), torch.randint(3, (12,))

        def loss(outputs, targets):
            scale = torch.ones(len(targets)).double()
            scale[1] = 1e200
            return outputs.sum(1) * scale

        with pytest.raises(ValueError, match="batch 0 of data: sample 1 has a self-influence that is not finite"):
            self_influence(model, loader(batch, 5), loss=loss)
