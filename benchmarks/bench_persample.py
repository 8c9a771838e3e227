"""Per-sample quantities on four models, each in units of a plain training step that is measured in turns with it.

Contestants: kdaif_fast; a loop over samples; torch.func; opacus; BackPACK. One that cannot do a model says why when
pytest is run with -rs. Every result is compared with a loop in float64 before it is timed. Peaks of memory, of this
library's rows and of a plain step, are those of processes of their own with one thread (persample_memory.py).
"""

from __future__ import annotations

import functools

import pytest
import torch
from baselines.backpack_persample import BackPACK
from baselines.func_persample import ForwardMode, VmapGrad
from baselines.loop_persample import Loop
from baselines.materialised_persample import Batch, Materialised, Tree, UnsupportedError
from baselines.opacus_persample import Opacus, OpacusGhost
from persample_memory import peak_of_a_process
from persample_models import MODELS, make, plain_step
from torch import Tensor, nn

from kdaif_fast import sigmoid_weights
from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grad_norms, per_sample_grads, weighted_step

TOLERANCE = 1e-5  # relative, in the 2-norm; float32 against float64
SHOWN = 2  # samples whose whole gradients are compared


class Ours(Materialised):
    """The calls of this library."""

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape]."""
        return per_sample_grads(self.model, batch)

    def dots(self, batch: Batch, direction: Tree) -> Tensor:
        """[N]"""
        return per_sample_grad_dots(self.model, batch, direction)

    def norms(self, batch: Batch) -> Tensor:
        """[N]"""
        return per_sample_grad_norms(self.model, batch)

    def weighted_step(self, batch: Batch, direction: Tree) -> None:
        """One pass."""
        self.model.zero_grad(set_to_none=True)
        weighted_step(self.model, batch, weight_fn=sigmoid_weights, direction=direction)


class OursIntoBuffers(Ours):
    """Gradients into memory that is there."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.buffers: Tree = {}

    def grads(self, batch: Batch) -> Tree:
        """Name -> [N, *shape], the same tensors each time."""
        if not self.buffers:
            N = len(batch[0])
            self.buffers = {name: p.new_zeros(N, *p.shape) for name, p in self.named_parameters().items()}
        return per_sample_grads(self.model, batch, out=self.buffers)


CONTESTANTS = {
    "kdaif_fast": Ours,
    "kdaif_fast, buffers given": OursIntoBuffers,
    "loop over samples": Loop,
    "torch.func jvp": ForwardMode,
    "torch.func vmap(grad)": VmapGrad,
    "opacus": Opacus,
    "opacus ghost norms": OpacusGhost,
    "BackPACK": BackPACK,
}
OURS = ("kdaif_fast", "kdaif_fast, buffers given")
EVERYTHING = ("kdaif_fast", "loop over samples", "torch.func vmap(grad)", "opacus", "BackPACK")
CAN = {
    "dots": (*EVERYTHING, "torch.func jvp"),
    "norms": (*EVERYTHING, "opacus ghost norms"),
    "weighted step": (*EVERYTHING, "torch.func jvp"),
    "gradients": (*EVERYTHING, "kdaif_fast, buffers given"),
}


@functools.cache
def problem(name, N=None):
    """The model, its batch, and a direction."""
    model, batch = make(name, N)
    return model, batch, {key: torch.randn_like(p) for key, p in model.named_parameters()}


@functools.cache
def truth(name, N=None):
    """Dots, norms, the weighted step's gradient and the first samples' gradients, from a loop in float64."""
    model, (x, y), direction = problem(name, N)
    batch = (x.double() if x.is_floating_point() else x, y)
    loop, direction = Loop(model.double()), {key: v.double() for key, v in direction.items()}
    model.float()
    loop.weighted_step(batch, direction)
    weighted = {key: p.grad for key, p in loop.named_parameters().items()}
    first = loop.grads((batch[0][:SHOWN], y[:SHOWN]))
    return {
        "dots": {"": loop.dots(batch, direction)},
        "norms": {"": loop.norms(batch)},
        "weighted step": weighted,
        "gradients": first,
    }


def call(contestant, quantity, batch, direction):
    """What is timed: a function without arguments."""
    return {
        "dots": lambda: contestant.dots(batch, direction),
        "norms": lambda: contestant.norms(batch),
        "weighted step": lambda: contestant.weighted_step(batch, direction),
        "gradients": lambda: contestant.grads(batch),
    }[quantity]


def assert_right(contestant, quantity, result, expected):
    if quantity == "weighted step":
        named, expected = contestant.named_parameters(), contestant.own(expected)
        result = {key: p.grad for key, p in named.items()}
    elif quantity == "gradients":
        result, expected = {key: g[:SHOWN] for key, g in result.items()}, contestant.own(expected, 1)
    else:
        result = {"": result}
    assert set(result) == set(expected)
    error = torch.stack([(result[key].double() - value).square().sum() for key, value in expected.items()]).sum()
    size = torch.stack([value.square().sum() for value in expected.values()]).sum()
    assert error.sqrt() < TOLERANCE * size.sqrt(), f"off by {(error / size).sqrt():.1e}"


def measure_row(measure_in, group, model_name, quantity, name, N=None):
    model, batch, direction = problem(model_name, N)
    try:
        contestant = CONTESTANTS[name](model)
        function = call(contestant, quantity, batch, direction)
        result = function()
    except UnsupportedError as reason:
        pytest.skip(str(reason))
    assert_right(contestant, quantity, result, truth(model_name, N)[quantity])
    del result
    peak = {}
    if N is None and name in OURS:
        peak["peak_mib"] = peak_of_a_process(model_name, quantity + name.removeprefix("kdaif_fast"))
    measure_in_plain_steps(measure_in, group, model_name, name, function, N, **peak)


def measure_in_plain_steps(measure_in, group, model_name, name, function, N=None, **peak):
    plain = make(model_name, N)
    measure_in("plain steps", lambda: plain_step(plain), group, name, function, **peak)


ROWS = [(model, quantity, name) for model in MODELS for quantity in CAN for name in CAN[quantity]]


@pytest.mark.parametrize(("model_name", "quantity", "name"), ROWS)
def bench_per_sample(measure_in, model_name, quantity, name):
    group = f"{quantity}, {model_name}, N = {MODELS[model_name][2]}"
    measure_row(measure_in, group, model_name, quantity, name)


@pytest.mark.parametrize("model_name", MODELS)
def bench_plain_step(measure_in, model_name):
    """The unit, in turns with itself: how far its ratio is from 1 is what the machine does to all of them."""
    model = make(model_name)
    peak = peak_of_a_process(model_name, "plain step")
    group = f"plain step, {model_name}, N = {MODELS[model_name][2]}"
    measure_in_plain_steps(measure_in, group, model_name, "plain step", lambda: plain_step(model), peak_mib=peak)


@pytest.mark.parametrize("name", CAN["weighted step"])
def bench_small_batch(measure_in, name):
    """Where calls cost more than arithmetic: the bound is two plain steps."""
    measure_row(measure_in, "weighted step, mlp, N = 8", "mlp", "weighted step", name, 8)
