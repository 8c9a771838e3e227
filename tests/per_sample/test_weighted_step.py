"""weighted_step as a training loop uses it: what it leaves in .grad, in buffers, in hooks and in random numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast import sigmoid_weights
from kdaif_fast.per_sample import per_sample_grad_dots, weighted_step

from .zoo import assert_close, assert_same, cross_entropy, trainable

N, FEATURES, CLASSES = 6, 5, 3


class Residual(nn.Module):
    """Dropout, a scale of its own, a layer called twice, and a counter."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(FEATURES, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, CLASSES))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        x = self.drop(self.first(x).relu() * self.scale)
        return self.head(self.drop(self.again(self.again(x).tanh())))


@pytest.fixture
def model():
    return Residual().double()


@pytest.fixture
def batch():
    return torch.randn(N, FEATURES).double(), torch.randint(CLASSES, (N,))


@pytest.fixture
def direction(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def gradients(model):
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def plain_backward(model, batch, weights, divisor=N):
    ((weights * cross_entropy(model(batch[0]), batch[1])).sum() / divisor).backward()


def test_one_dropout_mask_for_influence_and_gradient(model, batch, direction):
    model.train()
    torch.manual_seed(1)
    step = weighted_step(model, batch, weight_fn=sigmoid_weights, direction=direction)
    after = torch.get_rng_state()
    actual = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    losses = cross_entropy(model(batch[0]), batch[1])
    assert torch.equal(after, torch.get_rng_state()), "the step draws what one forward pass draws"
    rows = [torch.autograd.grad(loss, list(trainable(model).values()), retain_graph=True) for loss in losses]
    phi = torch.stack([-sum((g * v).sum() for g, v in zip(row, direction.values(), strict=True)) for row in rows])
    assert_close(step.phi, phi)
    assert_close(step.losses, losses.detach())
    assert_close(step.weights, sigmoid_weights(phi))
    ((sigmoid_weights(phi) * losses).sum() / N).backward()
    assert_same(actual, gradients(model))


def test_masks_differ_from_step_to_step(model, batch):
    model.train()
    one, other = (weighted_step(model, batch, torch.ones(N)).losses for _ in range(2))
    assert not torch.equal(one, other)


def test_buffers_are_those_of_one_training_step(model, batch):
    model.train()
    weighted_step(model, batch, torch.ones(N))
    assert model.calls == 1
    per_sample_grad_dots(model.eval(), batch, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    assert model.calls == 1


def test_weights_in_float32_and_none_of_them_equal(model, batch):
    weights = torch.rand(N)
    weighted_step(model.eval(), batch, weights)
    actual = gradients(model)
    model.zero_grad()
    plain_backward(model, batch, weights.double())
    assert_same(actual, gradients(model))


@pytest.mark.parametrize(
    "weights", [torch.zeros(N), torch.tensor([0.0, -2, 0, 5, 0, 1])], ids=["zeros", "some below 0"]
)
def test_unusual_weights(model, batch, weights):
    weighted_step(model.eval(), batch, weights.double())
    actual = gradients(model)
    model.zero_grad()
    plain_backward(model, batch, weights)
    assert_same(actual, gradients(model))


def test_accumulation(model, batch, direction):
    """Two halves with the divisor of the whole are the whole; what .grad holds already stays."""
    model.eval()
    weights = torch.rand(N).double()
    weighted_step(model, batch, weights)
    whole = gradients(model)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, N)):
        weighted_step(model, tuple(part[half] for part in batch), weights[half], divisor=N)
    assert_same(gradients(model), whole)
    before = [p.grad for p in model.parameters()]
    weighted_step(model, batch, weights)
    assert_same(gradients(model), {name: 2 * grad for name, grad in whole.items()})
    assert all(p.grad is kept for p, kept in zip(model.parameters(), before, strict=True)), "added to in place"


@pytest.mark.parametrize("with_direction", [False, True])
def test_grad_scaler(model, batch, direction, with_direction):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = dict(weight_fn=sigmoid_weights, direction=direction) if with_direction else dict(weights=torch.rand(N))
    model.eval()
    plain = weighted_step(model, batch, **options)
    expected = gradients(model)
    model.zero_grad()
    scaled = weighted_step(model, batch, scaler=scaler, **options)
    assert_same(gradients(model), {name: 1024 * grad for name, grad in expected.items()})
    assert_close(scaled.losses, plain.losses)
    assert_close(scaled.weights, plain.weights)
    if with_direction:
        assert_close(scaled.phi, plain.phi)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    assert_same(gradients(model), expected)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    scaler.step(optimizer)
    scaler.update()
    stepped = {name: p.detach() for name, p in trainable(model).items()}
    assert_same(stepped, {name: before[name] - 0.1 * expected[name] for name in before})


@pytest.mark.parametrize("kind", ["accumulated", "gradient"])
def test_hooks_on_parameters(model, batch, direction, kind):
    """They fire as often, and with what, they would in a backward pass."""
    weights = torch.rand(N).double()

    def record(model):
        seen = []
        for name, parameter in model.named_parameters():
            if kind == "accumulated":
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
            else:
                parameter.register_hook(lambda g, name=name: seen.append((name, g.clone())))
        return seen

    seen = record(model.eval())
    plain_backward(model, batch, weights)
    expected = dict(seen)
    assert len(seen) == len(expected)
    for options in ({}, {"direction": direction}):
        seen.clear()
        model.zero_grad()
        weighted_step(model, batch, weights, **options)
        assert sorted(name for name, _ in seen) == sorted(expected)
        assert_same({name: dict(seen)[name] for name in expected}, expected)


def test_hooks_that_change_the_gradient(model, batch, direction):
    """They change what arrives in .grad, and nothing of phi."""
    model.eval()
    plain = weighted_step(model, batch, weight_fn=sigmoid_weights, direction=direction)
    expected = gradients(model)
    model.zero_grad()
    handles = [p.register_hook(lambda g: 3 * g) for p in model.parameters()]
    changed = weighted_step(model, batch, weight_fn=sigmoid_weights, direction=direction)
    assert_close(changed.phi, plain.phi)
    assert_same(gradients(model), {name: 3 * grad for name, grad in expected.items()})
    dots = per_sample_grad_dots(model, batch, direction)
    assert_close(dots, -plain.phi)
    assert len(handles) == len(expected)


def test_parameters_without_gradient(model, batch):
    """Unused and frozen ones keep .grad None; others a zero of their own only if backward would give one."""
    model.idle = nn.Parameter(torch.ones(2).double())
    model.again.bias.requires_grad_(False)
    weighted_step(model.eval(), batch, torch.ones(N))
    assert model.idle.grad is None
    assert model.again.bias.grad is None
    assert set(gradients(model)) == set(trainable(model)) - {"idle"}


def test_chosen_parameters(model, batch, direction):
    model.eval()
    weights = torch.rand(N).double()
    plain_backward(model, batch, weights)
    expected = {name: g for name, g in gradients(model).items() if name.startswith("again")}
    for params in ("again", [model.again], [model.again.weight, "again.bias"]):
        model.zero_grad()
        weighted_step(model, batch, weights, params=params)
        assert_same(gradients(model), expected)
    model.zero_grad()
    part = {name: direction[name] for name in expected}
    step = weighted_step(model, batch, weight_fn=sigmoid_weights, direction=part, params="again")
    rest = {name: v if name in part else torch.zeros_like(v) for name, v in direction.items()}
    assert_close(step.phi, -per_sample_grad_dots(model, batch, rest))


def test_the_default_weight_rule_of_influence(model, batch, direction):
    """weights < 1 exactly where following the direction would raise the loss least: phi > 0 is harmful."""
    step = weighted_step(model.eval(), batch, weight_fn=sigmoid_weights, direction=direction)
    assert torch.equal(step.weights < 1, step.phi > 0)
    assert not step.phi.requires_grad
    assert not step.losses.requires_grad
    assert not step.weights.requires_grad


def test_teacher(model, batch):
    from kdaif_fast.ops import kd_loss

    weights, teacher = torch.rand(N).double(), torch.randn(N, CLASSES).double()
    step = weighted_step(model.eval(), (*batch, teacher), weights)
    actual = gradients(model)
    model.zero_grad()
    losses = kd_loss(model(batch[0]), teacher, batch[1])
    ((weights * losses).sum() / N).backward()
    assert_close(step.losses, losses.detach())
    assert_same(actual, gradients(model))


def test_with_momentum_it_trains_as_a_weighted_loss_does(batch):
    """Twenty steps with both."""
    models = [Residual().double().eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]
    for _ in range(20):
        weights = torch.rand(N).double()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        weighted_step(models[0], batch, weights)
        plain_backward(models[1], batch, weights)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(models[0].state_dict(), models[1].state_dict(), 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """As near to the truth as the plain backward pass in that precision is."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, CLASSES))
    x, y = torch.randn(16, 16), torch.randint(CLASSES, (16,))
    weights = torch.rand(16)
    ((weights * cross_entropy(model(x), y)).sum() / 16).backward()
    truth = gradients(model)
    model.zero_grad()
    model.to(dtype)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    step = weighted_step(model, (x.to(dtype), y), weights, direction=direction)
    for name, grad in gradients(model).items():
        assert grad.dtype == dtype
        error = (grad.float() - truth[name]).norm() / truth[name].norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01), name
    assert step.phi.dtype == torch.float32
    assert step.losses.dtype == torch.float32


def test_autocast():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, CLASSES))
    x, y, weights = torch.randn(16, 16), torch.randint(CLASSES, (16,)), torch.rand(16)
    ((weights * cross_entropy(model(x), y)).sum() / 16).backward()
    truth = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = F.cross_entropy(model(x), y, reduction="none")
    ((weights * losses).sum() / 16).backward()
    plain = gradients(model)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for options in ({}, {"direction": direction}):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step = weighted_step(model, (x, y), weights, **options)
        for name, grad in gradients(model).items():
            assert grad.dtype == torch.float32
            allowed = 2 * (plain[name] - truth[name]).norm() + 0.01 * truth[name].norm()
            assert (grad - truth[name]).norm() <= allowed, name
    assert step.phi.dtype == torch.float32
