"""What every call leaves as it was, under whatever mode it is called, and which forms its arguments may have."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdaif_fast.per_sample import (
    pairwise_grad_dots,
    per_sample_grad_dots,
    per_sample_grad_norms,
    per_sample_grads,
    weighted_step,
)
from tests.cases import MODELS, make

from .zoo import Case, assert_close, assert_same, cross_entropy, flat, trainable


def direction_of(model):
    return {name: torch.ones_like(p) for name, p in trainable(model).items()}


CALLS = {
    "grads": per_sample_grads,
    "norms": per_sample_grad_norms,
    "dots": lambda model, batch: per_sample_grad_dots(model, batch, direction_of(model)),
    "pairs": lambda model, batch: pairwise_grad_dots(model, batch, batch),
    "step": lambda model, batch: weighted_step(model, batch, torch.rand(len(batch[1])), direction=direction_of(model)),
}


def truth(model, batch):
    return Case(lambda: model, lambda n: None).truth(model, batch)


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_left_behind(call, name):
    model, batch, _ = make(name)
    model.register_buffer("untouched", torch.randn(3))
    state = {key: x.clone() for key, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    copies = [x.clone() for x in batch]
    call(model, batch)
    if call is not CALLS["step"]:  # whose own random weights are not the library's
        assert torch.equal(random_state, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(x, copy) for x, copy in zip(batch, copies, strict=True))
    for module in model.modules():
        assert not {**module._forward_hooks, **module._forward_pre_hooks, **module._backward_hooks}
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_training_mode_buffers():
    """Only the training step updates statistics, and once."""

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, batch = Counting().train(), (torch.randn(4, 5), torch.randint(3, (4,)))
    for name, call in CALLS.items():
        for _ in range(2):
            before = float(model.calls)
            call(model, batch)
            assert float(model.calls) - before == (1 if name == "step" else 0), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_every_gradient_mode(call, mode):
    model, batch, _ = make("attention")
    torch.manual_seed(1)
    expected = call(model, batch)
    model.zero_grad()
    torch.manual_seed(1)
    with mode():
        actual = call(model, batch)
    for one, other in zip(
        torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad


def test_batches_made_in_inference_mode(call):
    model, batch, _ = make("mlp")
    with torch.inference_mode():
        batch = tuple(x.clone() for x in batch)
    call(model, batch)


def test_inputs_that_require_grad(call):
    model, (x, y), _ = make("mlp")
    x.requires_grad_()
    call(model, (x, y))
    assert x.grad is None


def test_under_no_grad_the_step_still_trains():
    model, batch, _ = make("mlp")
    with torch.no_grad():
        weighted_step(model, batch, torch.ones(len(batch[1])))
    assert_same(
        {n: p.grad for n, p in trainable(model).items()}, {n: g.mean(0) for n, g in truth(model, batch).items()}
    )


class TestForms:
    """One batch, in the forms that people have them in."""

    @pytest.fixture
    def model(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(5, 3)

            def forward(self, x, scale):
                return self.layer(x) * scale[:, None]

        return Two().double()

    @pytest.fixture
    def parts(self):
        return torch.randn(4, 5).double(), torch.rand(4).double(), torch.randint(3, (4,))

    def test_forms(self, model, parts):
        x, scale, y = parts
        expected = truth(model, ((x, scale), y))
        for batch in (
            ((x, scale), y),
            [[x, scale], y],
            ({"x": x, "scale": scale}, y),
            {"inputs": (x, scale), "targets": y},
            {"targets": y, "inputs": {"scale": scale, "x": x}},
        ):
            assert_same(per_sample_grads(model, batch), expected)

    def test_outputs_with_logits(self, parts):
        class Wrapped(nn.Linear):
            def forward(self, x):
                return SimpleNamespace(logits=super().forward(x), hidden_states=x)

        model = Wrapped(5, 3).double()
        expected = {}
        for name, p in model.named_parameters():
            losses = cross_entropy(model(parts[0]).logits, parts[2])
            expected[name] = torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in losses])
        assert_same(per_sample_grads(model, (parts[0], parts[2])), expected)

    def test_tuples_with_a_loss_that_takes_them(self, parts):
        class Heads(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.left, self.right = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 1)

            def forward(self, x):
                x = self.body(x).tanh()
                return self.left(x), self.right(x)

        def loss(outputs, targets):
            left, right = outputs
            return cross_entropy(left, targets) + right.squeeze(1) ** 2

        model, batch = Heads().double(), (parts[0], parts[2])
        case = Case(lambda: model, lambda n: None, loss=loss)
        expected = case.truth(model, batch)
        for _ in range(2):
            assert_same(per_sample_grads(model, batch, loss), expected)
        weighted_step(model, batch, torch.ones(4), loss=loss)
        assert_same({n: p.grad for n, p in trainable(model).items()}, {n: g.mean(0) for n, g in expected.items()})


class TestParams:
    @pytest.fixture
    def setting(self):
        model, batch, _ = make("conv")
        return model, batch, truth(model, batch)

    def test_by_name_module_and_tensor(self, setting):
        model, batch, expected = setting
        for params, names in (
            ("0", ["0.weight", "0.bias"]),
            (["4.bias"], ["4.bias"]),
            (model[1], ["1.weight", "1.bias"]),
            ([model[0].weight, model[4]], ["0.weight", "4.weight", "4.bias"]),
        ):
            part = {name: expected[name] for name in names}
            assert_same(per_sample_grads(model, batch, params=params), part)
            assert_close(per_sample_grad_norms(model, batch, params=params), flat(part).norm(dim=1))
            assert_close(pairwise_grad_dots(model, batch, batch, params=params), flat(part) @ flat(part).T)
            v = torch.randn(flat(part).shape[1]).double()
            assert_close(per_sample_grad_dots(model, batch, v, params=params), flat(part) @ v)

    def test_frozen_in_turns(self, setting):
        """One model, whose trained parameters change between calls."""
        model, batch, expected = setting
        for frozen in ("0.weight", "1.bias", "4.weight"):
            model.requires_grad_(True)
            model.get_parameter(frozen).requires_grad_(False)
            assert_same(per_sample_grads(model, batch), {n: g for n, g in expected.items() if n != frozen})


class TestBuffers:
    def test_written_and_returned(self):
        model, batch, _ = make("attention")
        out = {n: torch.full((len(batch[1]), *p.shape), torch.nan).double() for n, p in trainable(model).items()}
        result = per_sample_grads(model, batch, out=out)
        assert all(result[name] is out[name] for name in out)
        assert_same(out, truth(model, batch))

    def test_parameters_that_take_no_part_are_zero(self):
        model, batch, _ = make("mlp")
        model.idle = nn.Parameter(torch.ones(2).double())
        out = {n: torch.full((len(batch[1]), *p.shape), torch.nan).double() for n, p in trainable(model).items()}
        assert not per_sample_grads(model, batch, out=out)["idle"].any()
        assert not per_sample_grad_norms(model, batch, per_parameter=True)["idle"].any()

    def test_results_do_not_share_memory(self):
        """A bias that is added as it is: its gradient is the output's, but nobody else's memory."""
        model, batch, _ = make("linear")
        first = per_sample_grads(model, batch)
        kept = {name: g.clone() for name, g in first.items()}
        for g in per_sample_grads(model, batch).values():
            g.zero_()
        assert_same(first, kept)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_compiled_models(name):
    model, batch, _ = make(name)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch[0])
    expected = truth(model, batch)
    assert_same(per_sample_grads(compiled, batch), expected)
    weighted_step(compiled, batch, torch.ones(len(batch[1])))
    assert_same({n: p.grad for n, p in trainable(model).items()}, {n: g.mean(0) for n, g in expected.items()})


def test_float32():
    """Near the truth as float32 goes."""
    for name in MODELS:
        model, batch, _ = make(name)
        expected = truth(model, batch)
        model.float()
        batch = tuple(x.float() if x.is_floating_point() else x for x in batch)
        for key, grads in per_sample_grads(model, batch).items():
            assert grads.dtype == torch.float32
            assert (grads - expected[key]).norm() <= 1e-4 * flat(expected).norm(), (name, key)
        norms = per_sample_grad_norms(model, batch)
        torch.testing.assert_close(norms, flat(expected).norm(dim=1).float(), rtol=1e-3, atol=1e-6)


def test_a_loss_with_parameters_of_the_model_in_it():
    """Such as a temperature that is learned: its part of the gradient does not pass through the outputs."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    model.temperature = torch.nn.Parameter(torch.tensor(0.7).double())

    def loss(outputs, targets):
        scaled = outputs / model.temperature
        return torch.nn.functional.cross_entropy(scaled, targets, reduction="none") + model.bias.square().sum()

    batch = torch.randn(5, 4).double(), torch.randint(3, (5,))
    rows = [
        torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in loss(model(batch[0]), batch[1])
    ]
    truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    grads = per_sample_grads(model, batch, loss)
    torch.testing.assert_close(
        torch.cat([grads[name].reshape(5, -1) for name, _ in model.named_parameters()], 1), truth
    )
