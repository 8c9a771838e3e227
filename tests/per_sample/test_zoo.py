"""Every quantity of every model in the zoo, against a loop over samples in float64."""

import pytest
import torch

from kdaif_fast.per_sample import (
    pairwise_grad_dots,
    per_sample_grad_dots,
    per_sample_grad_norms,
    per_sample_grads,
    weighted_step,
)

from . import (  # noqa: F401 (they fill the zoo)
    zoo_layers,
    zoo_modules,
    zoo_parameters,
    zoo_routes,
    zoo_sequences,
    zoo_traps,
)
from .zoo import CASES, assert_close, assert_same, flat, trainable


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def runs(case):
    """(model, batch, truth) for one model and batch after batch."""
    model = case.model()
    for batch in case.batches():
        yield model, batch, case.truth(model, batch)


@pytest.mark.slow
def test_truth(case):
    """The zoo's own: a sample's gradient does not depend on who else is in the batch, and is not zero throughout."""
    for model, batch, truth in runs(case):
        assert_same(truth, case.each_in_the_batch(model, batch), 1e-9)
        assert flat(truth).abs().max() > 1e-6


def test_grads_and_norms(case):
    for model, batch, truth in runs(case):
        assert_same(per_sample_grads(model, batch, case.loss), truth)
        per_parameter = per_sample_grad_norms(model, batch, case.loss, per_parameter=True)
        assert_same(per_parameter, {name: flat({name: grads}).norm(dim=1) for name, grads in truth.items()})
        assert_close(per_sample_grad_norms(model, batch, case.loss), flat(truth).norm(dim=1))


def test_dots(case):
    for model, batch, truth in runs(case):
        one = {name: torch.randn_like(p) for name, p in trainable(model).items()}
        three = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in trainable(model).items()}
        matrix = flat(truth)
        for direction in (one, flat(one, 0)):
            assert_close(per_sample_grad_dots(model, batch, direction, loss=case.loss), matrix @ flat(one, 0))
        for direction in (three, flat(three)):
            assert_close(per_sample_grad_dots(model, batch, direction, loss=case.loss), matrix @ flat(three).T)


def test_pairs(case):
    model = case.model()
    batches = list(case.batches())[:2]
    a, b = (flat(case.truth(model, batch)) for batch in batches)
    assert_close(pairwise_grad_dots(model, *batches, loss=case.loss), a @ b.T)


def test_weighted_step(case):
    for model, batch, truth in runs(case):
        losses = case.losses(model, batch).detach()
        weights = torch.rand(len(losses)).double()
        step = weighted_step(model, batch, weights, loss=case.loss)
        assert_same(taken_gradients(model), weighted_mean(truth, weights))
        assert_close(step.losses, losses)
        assert_close(step.weights, weights)
        assert step.phi is None

        direction = {name: torch.randn_like(p) for name, p in trainable(model).items()}
        step = weighted_step(model, batch, weight_fn=rule, direction=direction, loss=case.loss)
        phi = -(flat(truth) @ flat(direction, 0))
        assert_close(step.phi, phi)
        assert_close(step.weights, rule(phi))
        assert_same(taken_gradients(model), weighted_mean(truth, rule(phi)))
        assert_close(step.losses, losses)


def rule(phi):
    return 2 * torch.sigmoid(-phi)


def weighted_mean(truth, weights):
    return {name: torch.einsum("n,n...->...", weights, grads) / len(weights) for name, grads in truth.items()}


def taken_gradients(model):
    """What the step added, and away with it."""
    grads = {}
    for name, parameter in trainable(model).items():
        grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        parameter.grad = None
    return grads
