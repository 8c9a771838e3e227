"""Products of every operator against the dense matrix, over models with every kind of layer."""

import pytest
import torch
from torch.nn import functional as F

from kdaif_fast.curvature import GaussNewton, Hessian, Identity
from kdaif_fast.ops import kd_loss
from tests.cases import CLASSES, MODELS, Dense, N, make

# The dense Hessian is made by finite differences.
CLOSE = {GaussNewton: dict(rtol=1e-9, atol=1e-11), Hessian: dict(rtol=1e-6, atol=1e-8)}
DENSE = {GaussNewton: Dense.gauss_newton, Hessian: Dense.hessian}


def smooth_l1(outputs, targets):
    one_hot = targets[:, None] == torch.arange(CLASSES)
    return F.smooth_l1_loss(outputs, one_hot.to(outputs.dtype), reduction="none").sum(1)


def distillation(outputs, targets, teacher):
    return kd_loss(outputs, teacher, targets, temperature=3.0, alpha=0.2)


def products(operator, count):
    return torch.stack([operator.matvec(row) for row in torch.eye(count, dtype=torch.float64)])


@pytest.mark.parametrize("operator", DENSE)
@pytest.mark.parametrize("name", MODELS)
def test_is_the_dense_matrix(name, operator):
    model, batch, _ = make(name)
    expected = DENSE[operator](Dense(model), batch)
    torch.testing.assert_close(products(operator(model, batch), len(expected)), expected, **CLOSE[operator])
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("operator", DENSE)
@pytest.mark.parametrize("loss", [smooth_l1, distillation])
def test_any_loss(operator, loss):
    model, batch, _ = make("mlp")
    if loss is distillation:
        batch = (*batch, torch.randn(N, CLASSES, dtype=torch.float64))
    expected = DENSE[operator](Dense(model), batch, loss)
    torch.testing.assert_close(products(operator(model, batch, loss=loss), len(expected)), expected, **CLOSE[operator])


@pytest.mark.parametrize("operator", DENSE)
def test_loss_linear_in_the_outputs(operator):
    """Its Gauss-Newton matrix is zero; its Hessian need not be."""
    model, batch, _ = make("mlp")

    def linear(outputs, targets):
        return outputs.gather(1, targets[:, None])[:, 0]

    expected = DENSE[operator](Dense(model), batch, linear)
    torch.testing.assert_close(
        products(operator(model, batch, loss=linear), len(expected)), expected, **CLOSE[operator]
    )


@pytest.mark.parametrize("operator", DENSE)
def test_some_parameters(operator):
    model, batch, _ = make("mlp")
    model[0].bias.requires_grad_(False)
    everything = operator(model, batch)
    assert list(everything.parameters) == ["0.weight", "2.weight", "2.bias"]
    expected = DENSE[operator](Dense(model), batch)
    torch.testing.assert_close(products(everything, len(expected)), expected, **CLOSE[operator])
    head = ["2.weight", "2.bias"]
    expected = DENSE[operator](Dense(model, head), batch)
    for params in (head, "2", ["2"], [model[2].weight, "2.bias"]):
        torch.testing.assert_close(
            products(operator(model, batch, params=params), len(expected)), expected, **CLOSE[operator]
        )


@pytest.mark.parametrize("operator", [GaussNewton, Hessian, Identity])
def test_dictionaries_and_vectors(operator):
    model, batch, _ = make("mlp")
    curvature = operator(model, batch)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    flat = torch.cat([d.flatten() for d in direction.values()])
    product = curvature.matvec(direction)
    assert list(product) == list(direction)
    torch.testing.assert_close(torch.cat([p.flatten() for p in product.values()]), curvature.matvec(flat))


@pytest.mark.parametrize("operator", DENSE)
def test_leaves_everything_as_it_was(operator):
    model, batch, _ = make("mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():  # a caller's mode does not matter
        curvature = operator(model, batch)
        first = curvature.matvec(torch.ones(43, dtype=torch.float64))
        second = curvature.matvec(torch.ones(43, dtype=torch.float64))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("operator", DENSE)
def test_the_model_runs_once(operator):
    model, batch, _ = make("mlp")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    curvature = operator(model, batch)
    curvature.matvec(torch.ones(43, dtype=torch.float64))
    assert curvature.samples == N
    curvature.mean_eigenvalue()
    assert len(calls) == 1


def test_low_precision_models_have_float32_vectors():
    model, batch, _ = make("mlp")
    low = model.to(torch.bfloat16)
    x = batch[0].to(torch.bfloat16)
    product = GaussNewton(low, (x, batch[1])).matvec(torch.ones(43))
    assert product.dtype == torch.float32
    exact = GaussNewton(low.double(), (x.double(), batch[1])).matvec(torch.ones(43, dtype=torch.float64))
    assert (product.double() - exact).norm() / exact.norm() < 0.05


def test_mean_eigenvalue():
    model, batch, _ = make("mlp")
    expected = Dense(model).gauss_newton(batch).diagonal().mean().item()
    curvature = GaussNewton(model, batch)
    state = torch.get_rng_state()
    assert curvature.mean_eigenvalue(probes=2000) == pytest.approx(expected, rel=0.1)
    assert curvature.mean_eigenvalue() == curvature.mean_eigenvalue()
    assert torch.equal(torch.get_rng_state(), state)
    assert Identity(model, batch).mean_eigenvalue() == 1


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.ones(3), r"direction has shape \(3,\), expected \(15,\)"),
        ({"weight": torch.ones(3, 4)}, "differ in their names: bias"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(3)}, r"direction\['weight'\] has shape \(4, 3\)"),
    ],
)
def test_bad_direction(direction, message):
    model, batch, _ = make("linear")
    with pytest.raises(ValueError, match=message):
        GaussNewton(model, batch).matvec(direction)
