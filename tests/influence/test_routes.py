"""phi by every exact route: the same numbers to 1e-9, on models of about 2,000 parameters in float64."""

import functools

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdaif_fast import influence_scores
from kdaif_fast._objective import Objective
from kdaif_fast.curvature import GaussNewton
from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grads, weighted_step
from kdaif_fast.solvers import solve
from tests.curvature.test_dense_truth import error
from tests.curvature.truth import MODELS, problem

DAMPING = 0.02
EXACT = 1e-9


def validation(this):
    """Other inputs than the training samples have."""
    return this.batch[0].flip(-1)[:5], this.batch[1][:5]


def validation_gradient(this):
    x, y = validation(this)
    with sdpa_kernel(SDPBackend.MATH):
        loss = this.loss(this.model(x), y).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, this.parameters)])


@functools.cache
def truth(name):
    """The dense answer: s, and phi from gradients that were taken one at a time."""
    this = problem(name)
    damped = this.gauss_newton + DAMPING * torch.eye(this.P, dtype=torch.float64)
    s = torch.linalg.solve(damped, validation_gradient(this))
    return s, -this.grads() @ s


def forward_mode(this, s):
    names = [name for name, _ in this.model.named_parameters()]
    pieces = s.split([p.numel() for p in this.parameters])
    tangents = {n: t.view_as(p) for n, t, p in zip(names, pieces, this.parameters, strict=True)}
    values = {n: p.detach() for n, p in this.model.named_parameters()}

    def losses(values):
        return this.loss(functional_call(this.model, values, (this.batch[0],)), this.batch[1])

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward mode
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return jvp(losses, (values,), (tangents,))[1]
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def materialised(this, s):
    grads = per_sample_grads(this.model, this.batch, loss=this.loss)
    rows = grads if isinstance(grads, torch.Tensor) else torch.cat([g.flatten(1) for g in grads.values()], 1)
    return rows @ s


ROUTES = {
    "jvp": forward_mode,
    "dots": lambda this, s: per_sample_grad_dots(this.model, this.batch, s, loss=this.loss),
    "materialised": materialised,
    "objective": lambda this, s: Objective(this.model, this.batch, this.loss).dots(s[None])[:, 0],
    "weighted step": lambda this, s: -weighted_step(
        this.model, this.batch, torch.ones(len(this.batch[0]), dtype=torch.float64), direction=s, loss=this.loss
    ).phi,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_dots(name, route):
    s, phi = truth(name)
    this = problem(name)
    try:
        assert error(-ROUTES[route](this, s), phi) < EXACT
    finally:
        this.model.zero_grad()


@pytest.mark.parametrize("method", ["cg", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_solves(name, method):
    s, phi = truth(name)
    this = problem(name)
    options = {} if method == "exact" else {"tol": 1e-12, "max_iter": 2000}
    operator = GaussNewton(this.model, this.batch, loss=this.loss)
    solution = solve(operator, validation_gradient(this), method, damping=DAMPING, **options)
    assert error(solution.x, s) < EXACT
    assert error(-per_sample_grad_dots(this.model, this.batch, solution.x, loss=this.loss), phi) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_scores(name):
    this = problem(name)
    found = influence_scores(
        this.model, this.batch, validation(this), loss=this.loss, damping=DAMPING, tol=1e-12, max_iter=2000
    )
    assert error(found, truth(name)[1]) < EXACT
