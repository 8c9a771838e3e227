"""Models in training mode that draw at random or recompute, and models with hooks: as a plain backward pass has it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdaif_fast.per_sample import per_sample_grads, weighted_step

from .zoo import Case, assert_close, assert_same, cross_entropy, trainable

N, T, D, CLASSES = 4, 3, 4, 3


class Recomputed(nn.Module):
    """Layers with dropout that are run again in the backward pass, with the same mask."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.layers = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.4), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, D))

    def forward(self, x):
        x = self.first(x)
        return x + checkpoint(self.layers, x, use_reentrant=False)


class LayerDrop(nn.Module):
    """Every layer is left out with a probability of a half: the graph is another one each time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = x + layer(x).tanh()
        return x


class DropPath(nn.Module):
    """Residual branches that are left out for some of the samples."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x):
        kept = (torch.rand(len(x), *[1] * (x.dim() - 1)) < 0.5).to(x.dtype) if self.training else 1
        return x + self.layer(self.norm(x)) * kept


class Noise(nn.Module):
    """Weights with noise on them, one draw for the whole batch."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.zeros(D, D))

    def forward(self, x):
        noise = torch.randn(D, D, dtype=x.dtype) if self.training else 0
        return x @ (self.mean + self.log_scale.exp() * noise)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.GRU(D, D, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.network(x)[0]


BODIES = {
    "recomputed": Recomputed,
    "layer drop": LayerDrop,
    "drop path": DropPath,
    "noise on weights": Noise,
    "recurrent": Recurrent,
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 6, dropout=0.3, batch_first=True),
    "attention, positions first": lambda: nn.TransformerDecoderLayer(D, 2, 6, dropout=0.3),
    "channel dropout": lambda: nn.Sequential(nn.Conv1d(T, T, 1), nn.Dropout1d(0.5), nn.RReLU(), nn.Linear(D, D)),
}


class Model(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.before, self.body, self.head = nn.Linear(D, D), body, nn.Linear(D, CLASSES)

    def forward(self, x):
        x = self.before(x)
        if isinstance(self.body, nn.TransformerDecoderLayer):
            x = x.transpose(0, 1)
            return self.head(self.body(x, x).mean(0))
        return self.head(self.body(x).mean(1))


def batch():
    return torch.randn(N, T, D).double(), torch.randint(CLASSES, (N,))


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("with_direction", [False, True])
def test_randomness_is_that_of_one_pass(name, with_direction):
    model = Model(BODIES[name]()).double().train()
    direction = {key: torch.randn_like(p) for key, p in trainable(model).items()} if with_direction else None
    for seed in range(4):
        samples, weights = batch(), torch.rand(N).double()
        torch.manual_seed(seed)
        step = weighted_step(model, samples, weights, direction=direction)
        state = torch.get_rng_state()
        actual = {key: p.grad for key, p in trainable(model).items() if p.grad is not None}
        model.zero_grad()
        torch.manual_seed(seed)
        losses = cross_entropy(model(samples[0]), samples[1])
        rows = [
            torch.autograd.grad(loss, list(trainable(model).values()), retain_graph=True, materialize_grads=True)
            for loss in losses
        ]
        ((weights * losses).sum() / N).backward()
        assert torch.equal(state, torch.get_rng_state())
        assert_close(step.losses, losses.detach())
        assert_same(actual, {key: p.grad for key, p in trainable(model).items() if p.grad is not None})
        model.zero_grad()
        if direction is not None:
            phi = [-sum((g * v).sum() for g, v in zip(row, direction.values(), strict=True)) for row in rows]
            assert_close(step.phi, torch.stack(phi))


def full_backward_hook(model):
    model.body[0].register_full_backward_hook(lambda module, inputs, outputs: None)


def backward_hook_that_scales(model):
    model.body[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))


def backward_pre_hook(model):
    model.body[2].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))


def forward_hook_that_changes_outputs(model):
    model.body[0].register_forward_hook(lambda module, inputs, outputs: outputs * 2)


def forward_pre_hook(model):
    model.body[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))


def hook_on_an_activation(model):
    """Gradient reversal, as people write it."""
    model.body[0].register_forward_hook(lambda module, inputs, outputs: outputs.register_hook(lambda g: -g) and None)


HOOKS = [
    full_backward_hook,
    backward_hook_that_scales,
    backward_pre_hook,
    forward_hook_that_changes_outputs,
    forward_pre_hook,
    hook_on_an_activation,
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_modules_and_activations(register):
    model = Model(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))).double()
    register(model)
    case = Case(lambda: model, lambda n: None)
    for _ in range(2):
        samples, weights = batch(), torch.rand(N).double()
        truth = case.truth(model, samples)
        assert_same(per_sample_grads(model, samples), truth)
        weighted_step(model, samples, weights)
        actual = {key: p.grad for key, p in trainable(model).items()}
        assert_same(actual, {key: torch.einsum("n,n...->...", weights, g) / N for key, g in truth.items()})
        model.zero_grad()
