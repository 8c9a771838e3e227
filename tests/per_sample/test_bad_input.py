"""What cannot be answered raises an error that says what was given, what was expected, and the ways out."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdaif_fast import influence_scores
from kdaif_fast.per_sample import (
    pairwise_grad_dots,
    per_sample_grad_dots,
    per_sample_grad_norms,
    per_sample_grads,
    weighted_step,
)

N = 4


def dots(model, batch, loss=None, **options):
    return per_sample_grad_dots(model, batch, ones(model), loss=loss, **options)


def pairs(model, batch, loss=None, **options):
    return pairwise_grad_dots(model, batch, batch, loss=loss, **options)


def step(model, batch, loss=None, **options):
    return weighted_step(model, batch, torch.ones(N), loss=loss, **options)


CALLS = {"grads": per_sample_grads, "norms": per_sample_grad_norms, "dots": dots, "pairs": pairs, "step": step}


def ones(model):
    return {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.fixture
def batch():
    return torch.randn(N, 5), torch.randint(3, (N,))


def assert_untouched(model):
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.BatchNorm1d(4, track_running_stats=False)]
)
def test_batch_statistics(call, batch, layer):
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(layer), nn.Linear(4, 3)).train()
    with pytest.raises(ValueError, match=rf"'1.0' \({type(layer).__name__}\)[^.]*\. .*(eval\(\)|GroupNorm)"):
        call(model, batch)
    assert_untouched(model)
    if layer.track_running_stats:
        assert layer.num_batches_tracked == 0


class Centred(nn.Module):
    """Mixes the samples of a batch without any layer that is known to."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("name", ["grads", "norms", "dots", "step"])
def test_mixed_samples_on_request(batch, name):
    model = nn.Sequential(nn.Linear(5, 4), Centred(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="mixes the samples"):
        CALLS[name](model, batch, check_independence=True)
    assert_untouched(model)
    CALLS[name](nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 3)), batch, check_independence=True)


def test_scalar_loss(call, model, batch):
    with pytest.raises(ValueError, match=r"(?s)loss.*\(\).*(reduction='none'|per sample|one a sample|\[N\])"):
        call(model, batch, lambda outputs, targets: nn.functional.cross_entropy(outputs, targets))
    assert_untouched(model)


def test_too_many_losses(call, model, batch):
    with pytest.raises(ValueError, match=r"(?s)loss.*\(4, 3\)"):
        call(model, batch, lambda outputs, targets: outputs)


def test_no_samples(call, model):
    with pytest.raises(ValueError, match="no samples"):
        call(model, (torch.randn(0, 5), torch.zeros(0, dtype=torch.int64)))


def test_leading_dimensions_that_disagree(call, model, batch):
    with pytest.raises(ValueError, match=r"targets .*3.*4"):
        call(model, (batch[0], batch[1][:3]))
    with pytest.raises(ValueError, match=r"teacher_logits .*2.*4"):
        call(model, (*batch, torch.randn(2, 3)))


def test_outputs_that_are_no_tensor(call, batch):
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match=r"tuple.*loss="):
        call(Two(5, 3), batch)


def test_reentrant_checkpoints(call, batch):
    class Checkpointed(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    model = nn.Sequential(nn.Linear(5, 5), Checkpointed(5, 3))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        call(model, batch)
    assert_untouched(model)


def test_outputs_without_graph(call, batch):
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="do not depend on the chosen parameters"):
        call(Detached(5, 3), batch)


def test_nothing_to_train(call, model, batch):
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        call(model.requires_grad_(False), batch)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ("3", ValueError, "'3'"),
        ([], ValueError, "empty"),
        ([7], TypeError, "int"),
        (torch.ones(2), ValueError, r"\(2,\)"),
    ],
)
def test_params(call, model, batch, params, error, match):
    if call is CALLS["dots"]:
        pytest.skip("its direction does not fit either")
    with pytest.raises(error, match=match):
        call(model, batch, params=params)


@pytest.mark.parametrize("form", [7, "batch", (1,), {"inputs": torch.ones(2, 5)}, {"x": 1, "y": 2}])
def test_batches(call, model, form):
    with pytest.raises((TypeError, ValueError), match="batch"):
        call(model, form)


def test_an_exception_of_the_model_leaves_nothing_behind(call, batch):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 3, batch_first=True)

        def forward(self, x):
            self.rnn(x[:, None])
            raise ArithmeticError("as it happens")

    model = Failing()
    enabled = torch.is_grad_enabled()
    with pytest.raises(ArithmeticError, match="as it happens"):
        call(model, batch)
    assert_untouched(model)
    assert torch.is_grad_enabled() == enabled


def test_an_exception_of_the_loss_leaves_nothing_behind(call, model, batch):
    def loss(outputs, targets):
        raise ArithmeticError("as it happens")

    with pytest.raises(ArithmeticError, match="as it happens"):
        call(model, batch, loss)
    assert_untouched(model)
    call(model, batch)


class TestDirections:
    def dots(self, model, batch, direction):
        for call in (per_sample_grad_dots, lambda *args: weighted_step(*args[:2], torch.ones(N), direction=args[2])):
            with pytest.raises(ValueError, match="direction") as caught:
                call(model, batch, direction)
            assert_untouched(model)
        return str(caught.value)

    def test_missing_entry(self, model, batch):
        direction = ones(model)
        del direction["2.bias"]
        assert "2.bias" in self.dots(model, batch, direction)

    def test_superfluous_entry(self, model, batch):
        assert "other" in self.dots(model, batch, ones(model) | {"other": torch.ones(2)})

    def test_wrong_shape(self, model, batch):
        message = self.dots(model, batch, ones(model) | {"2.bias": torch.ones(5)})
        assert "2.bias" in message
        assert "(5,)" in message
        assert "(3,)" in message

    def test_wrong_count(self, model, batch):
        message = self.dots(model, batch, torch.ones(7))
        assert "(7,)" in message
        assert "39" in message

    def test_other_device(self, model, batch):
        assert "meta" in self.dots(model, batch, torch.ones(39, device="meta"))

    def test_what_influence_scores_returned(self, model, batch):
        phi, solution = influence_scores(model, batch, batch, return_solution=True)
        for direction in (solution, (phi, solution)):
            with pytest.raises(TypeError, match=r"solution\.x"):
                weighted_step(model, batch, torch.ones(N), direction=direction)

    def test_names_of_a_compiled_model(self, model, batch):
        direction = ones(torch.compile(model))
        assert next(iter(direction)).startswith("_orig_mod.")
        plain = per_sample_grad_dots(model, batch, ones(model))
        assert torch.equal(per_sample_grad_dots(model, batch, direction), plain)
        assert torch.equal(per_sample_grad_dots(torch.compile(model), batch, ones(model)), plain)

    def test_entry_that_is_no_tensor(self, model, batch):
        with pytest.raises(TypeError, match=r"2\.bias.*str"):
            per_sample_grad_dots(model, batch, ones(model) | {"2.bias": "x"})

    def test_no_direction_at_all(self, model, batch):
        direction = {name: torch.ones(0, *p.shape) for name, p in model.named_parameters()}
        assert per_sample_grad_dots(model, batch, direction).shape == (N, 0)

    def test_stacks_of_different_height(self, model, batch):
        direction = {name: torch.ones(2, *p.shape) for name, p in model.named_parameters()}
        direction["0.bias"] = torch.ones(3, 4)
        assert "0.bias" in self.dots(model, batch, direction)

    def test_one_direction_only_for_a_step(self, model, batch):
        direction = {name: torch.ones(2, *p.shape) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="expected one"):
            weighted_step(model, batch, torch.ones(N), direction=direction)


class TestWeights:
    def test_neither_weights_nor_rule(self, model, batch):
        with pytest.raises(ValueError, match=r"weights.*weight_fn"):
            weighted_step(model, batch)

    def test_division_by_zero(self, model, batch):
        with pytest.raises(ValueError, match="divisor is 0"):
            weighted_step(model, batch, torch.ones(N), divisor=0)
        assert_untouched(model)

    def test_rule_without_direction(self, model, batch):
        with pytest.raises(ValueError, match="direction"):
            weighted_step(model, batch, weight_fn=torch.sigmoid)

    def test_both(self, model, batch):
        with pytest.raises(ValueError, match="both"):
            weighted_step(model, batch, torch.ones(N), weight_fn=torch.sigmoid, direction=ones(model))

    @pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(N, 1), torch.ones(()), [1.0] * N])
    def test_wrong_shape(self, model, batch, weights):
        with pytest.raises(ValueError, match=r"weights is .*expected .*\(4,\)"):
            weighted_step(model, batch, weights)
        assert_untouched(model)

    @pytest.mark.parametrize("rule", [lambda phi: phi.sum(), lambda phi: 1.0, lambda phi: phi[:-1]])
    def test_rules_that_return_something_else(self, model, batch, rule):
        with pytest.raises(ValueError, match=r"weight_fn returned .*expected .*\(4,\)"):
            weighted_step(model, batch, weight_fn=rule, direction=ones(model))
        assert_untouched(model)

    def test_rule_that_raises(self, model, batch):
        def rule(phi):
            raise ArithmeticError("as it happens")

        with pytest.raises(ArithmeticError, match="as it happens"):
            weighted_step(model, batch, weight_fn=rule, direction=ones(model))
        assert_untouched(model)


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype", "layout"])
def test_buffers_that_do_not_fit(model, batch, fault):
    out = {name: torch.empty(N, *p.shape) for name, p in model.named_parameters()}
    if fault == "missing":
        del out["0.bias"]
    elif fault == "shape":
        out["0.bias"] = torch.empty(N + 1, 4)
    elif fault == "dtype":
        out["0.bias"] = out["0.bias"].double()
    else:
        out["0.bias"] = torch.empty(4, N).t()
    with pytest.raises(ValueError, match=r"out.*0\.bias"):
        per_sample_grads(model, batch, out=out)


@pytest.mark.parametrize("name", ["grads", "norms", "dots", "step"])
def test_a_loss_that_mixes_samples_on_request(batch, name):
    def contrast(outputs, targets):
        return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")

    model = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="depends on more than"):
        CALLS[name](model, batch, contrast, check_independence=True)
    assert_untouched(model)
