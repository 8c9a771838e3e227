"""Plans: made once, kept where they hold, made again where they may not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grads, recording, register_rule
from kdaif_fast.per_sample.terms import LinearTerm
from tests.cases import Dense


@pytest.fixture
def probes(monkeypatch):
    """The number of samples of each probe that is made."""
    made = []

    def counted(graph, root, cotangent):
        made.append(len(root))
        return probe(graph, root, cotangent)

    probe = recording.probe
    monkeypatch.setattr(recording, "probe", counted)
    return made


def batch(n=7, features=4):
    return torch.randn(n, features, dtype=torch.float64), torch.randint(3, (n,))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def check(model, samples):
    dense = Dense(model)
    grads = per_sample_grads(model, samples)
    torch.testing.assert_close(dense.flat(grads, 1), dense.grads(samples))


def test_one_probe_on_few_samples_is_enough(probes):
    model = mlp()
    for n in (7, 2, 50):
        check(model, batch(n))
    assert probes == [3]


def test_another_graph_is_probed_again(probes):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = mlp(), nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
            self.extra = False

        def forward(self, x):
            x = self.one(self.body(x))
            return self.two(torch.sigmoid(x)) if self.extra else x

    model = Branching()
    check_used = [name for name, _ in model.named_parameters() if not name.startswith("two")]
    samples = batch()
    grads = per_sample_grads(model, samples, params=check_used)
    dense = Dense(model, check_used)
    torch.testing.assert_close(dense.flat(grads, 1), dense.grads(samples))
    model.extra = True
    check(model, samples)
    assert len(probes) == 2


def test_zero_gradients_are_not_taken_for_knowledge(probes):
    """A head of zeros sends no gradient down, so nothing can be said of the layers below, until it has learned."""
    model = mlp()
    nn.init.zeros_(model[2].weight)
    samples = batch()
    check(model, samples)
    nn.init.normal_(model[2].weight)
    check(model, samples)
    check(model, batch(9))
    assert probes[-1] == 3


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_model_is_probed_once(probes, layer):
    """Its recurrent weight has no gradient at the first step, where the state is zero."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = layer(4, 5, batch_first=True).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = Last()
    for n in (7, 5):
        samples = torch.randn(n, 3, 4, dtype=torch.float64), torch.randint(3, (n,))
        losses = F.cross_entropy(model(samples[0]), samples[1], reduction="none")
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        grads = torch.cat([g.flatten(1) for g in per_sample_grads(model, samples).values()], 1)
        torch.testing.assert_close(grads, truth)
    assert len(probes) == 1


def test_routed_rows_are_probed_for_every_batch(probes):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(4, 2).double()
            self.experts = nn.ModuleList(nn.Linear(4, 3).double() for _ in range(2))

        def forward(self, x):  # [N, T, 4]
            rows = x.flatten(0, 1)
            gate = self.router(rows).softmax(1)
            chosen = gate.argmax(1)
            out = torch.zeros(len(rows), 3, dtype=x.dtype)
            for e, expert in enumerate(self.experts):
                at = (chosen == e).nonzero().squeeze(1)
                out = out.index_add(0, at, expert(rows[at]) * gate[at, e : e + 1])
            return out.unflatten(0, x.shape[:2]).mean(1)

    model = Routed()
    for n in (6, 6, 5):
        samples = torch.randn(n, 4, 4, dtype=torch.float64), torch.randint(3, (n,))
        expected = []
        for i in range(n):
            loss = F.cross_entropy(model(samples[0][i : i + 1]), samples[1][i : i + 1])
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            expected.append(torch.cat([g.flatten() for g in grads]))
        grads = torch.cat([g.flatten(1) for g in per_sample_grads(model, samples).values()], 1)
        torch.testing.assert_close(grads, torch.stack(expected))
    assert probes.count(6) == 2
    assert probes.count(5) == 1


def test_a_mixing_layer_is_named():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            x = self.inner(x)
            return self.outer(torch.tanh(x - x.mean(0)))

    with pytest.raises(ValueError, match="mixes the samples"):
        per_sample_grads(Centred(), batch())


def test_nothing_is_left_behind():
    model = mlp()
    state = torch.get_rng_state()
    per_sample_grads(model, batch_ := (torch.ones(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError):
        per_sample_grads(model, batch_, loss=lambda z, y: 1 / 0)
    assert all(p.grad is None for p in model.parameters())


class Shift(nn.Module):
    """A module with a rule of its own, called twice in a model."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_a_rule_for_a_module(monkeypatch):
    monkeypatch.setattr("kdaif_fast.per_sample.module_rules._MODULE_RULES", {})
    calls = []

    @register_rule(Shift)
    def shift(module, inputs, output_grad):
        calls.append(len(output_grad))
        (x,) = inputs
        before = output_grad * (1 - module(x) ** 2)
        return {"linear.weight": LinearTerm(x.unsqueeze(1), before.unsqueeze(1)), "linear.bias": before}

    twice = Shift()
    model = nn.Sequential(nn.Linear(4, 4).double(), twice, twice, nn.Linear(4, 3).double())
    samples = batch()
    # Not by functional_call, which spoils a model that holds a module under two names (torch 2.13).
    losses = F.cross_entropy(model(samples[0]), samples[1], reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    for _ in range(2):
        grads = torch.cat([g.flatten(1) for g in per_sample_grads(model, samples).values()], 1)
        torch.testing.assert_close(grads, truth)
    direction = torch.randn(truth.shape[1], dtype=torch.float64)
    torch.testing.assert_close(per_sample_grad_dots(model, samples, direction), truth @ direction)
    assert calls
    assert set(calls) == {7}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"linear.weight": torch.zeros(7, 4)}, r"'linear.weight', expected \(7, 4, 4\)"),
        ({"nothing": torch.zeros(7)}, "'nothing'"),
    ],
)
def test_a_rule_that_is_wrong(monkeypatch, returned, message):
    monkeypatch.setattr("kdaif_fast.per_sample.module_rules._MODULE_RULES", {Shift: lambda *_: returned})
    with pytest.raises(ValueError, match=message):
        per_sample_grads(nn.Sequential(Shift(), nn.Linear(4, 3).double()), batch())


def test_register_rule_takes_classes_of_modules():
    with pytest.raises(TypeError, match="expected a subclass"):
        register_rule(torch.relu)
