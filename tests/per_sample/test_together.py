"""Small terms are multiplied together: the same products and sums as one by one, however many wait."""

import importlib

import pytest
import torch
from torch import nn

from kdaif_fast.per_sample import weighted_step
from kdaif_fast.per_sample.terms import Materialised, Together

dots_module = importlib.import_module("kdaif_fast.per_sample.dots")


class Scaled(nn.Module):
    """Biases, norms, a scalar and a parameter with two axes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 6), nn.LayerNorm((2, 3))
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(2, 3))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = self.norm(self.first(x).view(-1, 2, 3)) * self.scale + self.shift
        return self.last(h.flatten(1))


@pytest.fixture
def problem():
    model = Scaled()
    batch = torch.randn(7, 5), torch.randint(3, (7,))
    return model, batch, {name: torch.randn_like(p) for name, p in model.named_parameters()}


def step(problem):
    model, batch, direction = problem
    model.zero_grad()
    result = weighted_step(model, batch, weight_fn=torch.sigmoid, direction=direction)
    return result.phi, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("most_waiting", [0, 60, 1 << 22])
def test_one_by_one_and_together(problem, most_waiting, monkeypatch):
    monkeypatch.setattr(dots_module, "_SMALL_ON_CPU", 0)
    phi, grads = step(problem)
    monkeypatch.setattr(dots_module, "_SMALL_ON_CPU", 1 << 15)
    monkeypatch.setattr(dots_module, "_MOST_WAITING", most_waiting)
    together, grads_together = step(problem)
    torch.testing.assert_close(together, phi)
    assert grads.keys() == grads_together.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_together[name], grad)


def test_fewer_calls(problem, monkeypatch):
    def calls():
        counts = []
        original = Materialised.dots
        monkeypatch.setattr(Materialised, "dots", lambda self, v: counts.append(1) or original(self, v))
        step(problem)
        monkeypatch.setattr(Materialised, "dots", original)
        return len(counts)

    assert calls() == 1
    monkeypatch.setattr(dots_module, "_SMALL_ON_CPU", 0)
    assert calls() == 6


def test_parts_are_terms():
    terms = [Materialised(torch.randn(4, *shape)) for shape in ((), (3,), (2, 5))]
    weights, out = torch.randn(4), torch.empty(4, 2, 5)
    whole = Together(terms)
    for part, term in zip(whole.parts, terms, strict=True):
        directions = torch.randn(2, *term.shape)
        assert part.shape == term.shape
        torch.testing.assert_close(part.grads(), term.grads())
        torch.testing.assert_close(part.dots(directions), term.dots(directions))
        torch.testing.assert_close(part.weighted(weights), term.weighted(weights))
        torch.testing.assert_close(part.weighted(2 * weights), 2 * term.weighted(weights))
        torch.testing.assert_close(part.block(1, 3).grads(), term.grads()[1:3])
        torch.testing.assert_close(part.squared_norms(), term.squared_norms())
    assert whole.parts[2].grads(out) is out
