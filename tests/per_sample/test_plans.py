"""What is learned of a model from one batch must not be believed where it no longer holds."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from kdaif_fast.per_sample import (
    pairwise_grad_dots,
    per_sample_grad_dots,
    per_sample_grad_norms,
    per_sample_grads,
    recording,
    weighted_step,
)

from .zoo import Case, assert_close, assert_same, cross_entropy, flat, run, trainable

CLASSES = 3


def truth(model, batch, loss=cross_entropy):
    return Case(lambda: model, lambda n: None, loss=loss).truth(model, batch)


def assert_right(model, batch):
    expected = truth(model, batch)
    assert_same(per_sample_grads(model, batch), expected)
    assert_close(per_sample_grad_norms(model, batch), flat(expected).norm(dim=1))
    v = torch.randn(flat(expected).shape[1]).double()
    assert_close(per_sample_grad_dots(model, batch, v), flat(expected) @ v)
    weights = torch.rand(len(batch[1])).double()
    step = weighted_step(model, batch, weights, direction=v)
    assert_close(step.phi, -flat(expected) @ v)
    actual = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable(model).items()}
    assert_same(actual, {n: torch.einsum("n,n...->...", weights, g) / len(weights) for n, g in expected.items()})
    model.zero_grad()


def vectors(n, features=5):
    return torch.randn(n, features).double(), torch.randint(CLASSES, (n,))


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)).double()


def test_output_layer_that_begins_at_zero():
    """Nothing but the last layer gets a gradient at first; after a step everything does."""
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    batch = vectors(6)
    assert_right(model, batch)
    for _ in range(3):
        weighted_step(model, batch, torch.ones(6))
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
        model.zero_grad()
        assert_right(model, batch)


def test_residual_branches_that_begin_at_zero():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gain = nn.Linear(5, 5), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.gain * self.layer(x).tanh()

    model = nn.Sequential(Block(), Block(), nn.Linear(5, CLASSES)).double()
    assert_right(model, vectors(4))
    with torch.no_grad():
        model[1].gain += 1
    assert_right(model, vectors(4))
    with torch.no_grad():
        model[0].gain += 1
    assert_right(model, vectors(4))


def test_low_rank_updates_that_begin_at_zero():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.frozen(x) + self.up(self.down(x))

    model = nn.Sequential(LowRank(), nn.Tanh(), LowRank(), nn.Linear(5, CLASSES)).double()
    assert_right(model, vectors(4))
    for part in (model[0], model[2]):
        nn.init.normal_(part.up.weight)
    assert_right(model, vectors(4))


def test_dead_units_that_come_alive():
    model = mlp()
    with torch.no_grad():
        model[0].bias -= 100
    assert_right(model, vectors(5))
    with torch.no_grad():
        model[0].bias += 100
    assert_right(model, vectors(5))


def test_samples_without_gradient():
    """A loss that leaves some samples, or all but one, out."""

    def masked(outputs, targets):
        losses = nn.functional.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
        return torch.where(targets >= 0, losses, 0.0)

    model = mlp()
    for kept in ([0], [3], [1, 2], [], [0, 1, 2, 3, 4]):
        x, y = vectors(5)
        targets = torch.full_like(y, -1)
        targets[kept] = y[kept]
        case = Case(lambda: model, lambda n: None, loss=masked)
        expected = case.truth(model, (x, targets))
        assert_same(per_sample_grads(model, (x, targets), masked), expected)
        assert_close(per_sample_grad_norms(model, (x, targets), masked), flat(expected).norm(dim=1))


def test_samples_that_are_all_alike():
    model = mlp()
    x, y = vectors(1)
    assert_right(model, (x.expand(5, 5), y.expand(5)))
    assert_right(model, vectors(5))


def test_every_batch_size():
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES)).double()
    for n in (1, 2, 3, 4, 6, 1, 12, 3, 2):
        assert_right(model, (torch.randn(n, 2, 6).double(), torch.randint(CLASSES, (n,))))


def test_sequences_of_every_length():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)  # positions first
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.layer(x.transpose(0, 1)).mean(0))

    model = Model().double()
    for n, length in ((4, 4), (4, 8), (3, 6), (3, 3), (6, 3), (1, 5), (5, 1), (1, 1), (2, 4)):
        assert_right(model, (torch.randn(n, length, 4).double(), torch.randint(CLASSES, (n,))))


def test_graphs_that_change_from_call_to_call():
    class Deep(nn.Module):
        """As many layers as it is told; some of them are left out (layer drop)."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
            self.head = nn.Linear(5, CLASSES)
            self.used = []

        def forward(self, x):
            for index in self.used:
                x = x + self.layers[index](x).tanh()
            return self.head(x)

    model = Deep().double()
    for used in ([0, 1, 2, 3], [1], [], [3, 2], [2, 3], [0, 0, 0], [1]):
        model.used = used
        assert_right(model, vectors(4))


def test_same_graph_with_other_axes():
    class Turned(nn.Module):
        """The graph of both kinds of call has the same nodes."""

        def __init__(self):
            super().__init__()
            self.layer, self.head, self.turned = nn.Linear(4, 4), nn.Linear(4, CLASSES), False

        def forward(self, x):
            order = (1, 0, 2) if self.turned else (0, 1, 2)
            x = self.layer(x.permute(order)).tanh().permute(order)
            return self.head(x.mean(1))

    model = Turned().double()
    for turned in (False, True, False):
        model.turned = turned
        assert_right(model, (torch.randn(4, 4, 4).double(), torch.randint(CLASSES, (4,))))


def test_modes_and_weights_in_turn():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    model.train()(torch.randn(20, 5).double())
    model.eval()
    for _ in range(2):
        assert_right(model, vectors(4))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))


def test_copies_of_a_model_have_plans_of_their_own():
    model = mlp()
    assert_right(model, vectors(4))
    twin = copy.deepcopy(model)
    twin[1] = nn.Tanh()
    assert_right(twin, vectors(4))
    model[0] = nn.Linear(5, 4).double()  # a layer that is exchanged
    assert_right(model, vectors(4))


def test_models_are_not_kept_alive():
    model = mlp()
    assert_right(model, vectors(4))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_outputs_with_samples_in_another_axis():
    """[T, N, V] outputs: either right, or an error; T = N tells nothing."""

    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, 1)

    def loss(outputs, targets):
        outputs = outputs.transpose(0, 1)
        return (
            nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            .view(targets.shape)
            .mean(1)
        )

    for n, length in ((4, 4), (4, 5)):
        model = Turned(5, CLASSES).double()
        batch = (torch.randn(n, length, 5).double(), torch.randint(CLASSES, (n, length)))
        expected = Case(lambda m=model: m, lambda n: None, loss=loss).truth(model, batch)
        try:
            actual = per_sample_grads(model, batch, loss)
        except ValueError as error:
            assert "sample" in str(error)  # noqa: PT017 (an error is as good as the right answer)
            continue
        assert_same(actual, expected)
    assert run(model, batch[0]).shape == (5, 4, CLASSES)


class PositionsFirst(nn.Module):
    """[N, T, 5] or [N, T, H, 5], with layers on [T, N, ...]."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.two(self.one(x.transpose(0, 1).contiguous()).tanh()).mean(0)
        return y.flatten(1, -2).mean(1) if y.dim() > 2 else y


@pytest.mark.parametrize("heads", [(), (2,)])
def test_one_position_does_not_tell_the_order_of_several(heads):
    model = PositionsFirst().double()
    for T in (1, 5, 7, 1, 2):
        assert_right(model, (torch.randn(5, T, *heads, 5).double(), torch.randint(CLASSES, (5,))))


@pytest.mark.parametrize("sick", [[1], [0, 1, 2]])
def test_samples_that_are_not_finite(sick):
    """They spoil their own numbers, and no others': neither in this batch nor, by a wrong plan, in later ones."""
    model = mlp()
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    inputs, targets = vectors(7)
    expected = per_sample_grad_dots(copy.deepcopy(model), (inputs, targets), v)
    spoilt = inputs.clone()
    spoilt[sick] = torch.nan
    actual = per_sample_grad_dots(model, (spoilt, targets), v)
    assert torch.equal(actual.isnan().nonzero().flatten(), torch.tensor(sick))
    assert_close(actual.nan_to_num(), torch.where(actual.isnan(), 0, expected))
    assert_right(model, (inputs, targets))


def test_nothing_is_finite():
    model = mlp()
    batch = vectors(4)
    with pytest.raises(ValueError, match="not finite"):
        per_sample_grad_norms(model, (batch[0] * torch.nan, batch[1]))
    assert_right(model, batch)


class Watched(nn.Module):
    """Leaves an activation where a loss can find it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        self.seen = self.one(x).tanh()
        return self.two(self.seen)


@pytest.mark.parametrize("penalty", ["weights", "activations"])
def test_losses_that_depend_on_more_than_the_outputs(penalty):
    model = Watched().double()

    def loss(outputs, targets):
        more = model.one.weight.square().sum() if penalty == "weights" else model.seen.square().sum(1)
        return cross_entropy(outputs, targets) + more

    batch = vectors(6)
    expected = truth(model, batch, loss)
    assert_same(per_sample_grads(model, batch, loss), expected)
    assert_close(per_sample_grad_norms(model, batch, loss), flat(expected).norm(dim=1))
    weighted_step(model, batch, torch.ones(6), loss=loss)
    assert_same({n: p.grad for n, p in trainable(model).items()}, {n: g.mean(0) for n, g in expected.items()})


def test_a_matrix_that_is_used_upright_and_turned():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.head((x @ self.weight.permute(1, 0)).tanh() @ self.weight.permute(0, 1))

    assert_right(Turned().double(), vectors(6))


def test_results_share_no_memory():
    """Two biases of one sum have the same gradient."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.bias = nn.Linear(5, CLASSES), nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x):
            return self.layer(x) + self.bias

    grads = per_sample_grads(Twice().double(), vectors(4))
    kept = grads["bias"].clone()
    grads["layer.bias"].zero_()
    assert torch.equal(grads["bias"], kept)


def test_a_factor_in_a_wider_dtype():
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.head(x.bfloat16() * self.gain)

    assert_right(Wider().double(), vectors(4))


@pytest.mark.parametrize("first", [True, False])
def test_complex_parameters(first):
    """Norms and products of them are real."""

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            if first:
                self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))
            self.head = nn.Linear(5, CLASSES)
            if not first:
                self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))

        def forward(self, x):
            return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=5))

    model = Filter()
    model.head.double()
    batch = vectors(6)
    expected = {n: torch.view_as_real(g) if g.is_complex() else g for n, g in truth(model, batch).items()}
    norms = per_sample_grad_norms(model, batch)
    assert not norms.is_complex()
    assert_close(norms, flat(expected).norm(dim=1))
    parts = per_sample_grad_norms(model, batch, per_parameter=True)
    assert_same(parts, {n: g.flatten(1).norm(dim=1) for n, g in expected.items()})
    assert_close(pairwise_grad_dots(model, batch, batch), flat(expected) @ flat(expected).T)
    v = {n: torch.randn_like(p) for n, p in trainable(model).items()}
    v_flat = flat({n: torch.view_as_real(x) if x.is_complex() else x for n, x in v.items()}, 0)
    assert_close(per_sample_grad_dots(model, batch, v), flat(expected) @ v_flat)


@pytest.mark.parametrize("error", [AssertionError, KeyError])
def test_a_model_that_takes_no_small_batches(error):
    """It cannot be run on a few samples, three of them, whatever it raises."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, CLASSES)

        def forward(self, x):
            if len(x) == 3:
                raise error
            return self.layer(x)

    assert_right(Fixed().double(), vectors(6))


@pytest.mark.parametrize("by", ["index", "index_select"])
def test_a_bare_table_is_as_good_as_an_embedding(by, monkeypatch):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(9, 5)), nn.Linear(5, CLASSES)

        def forward(self, tokens):
            rows = self.table[tokens] if by == "index" else self.table.index_select(0, tokens.flatten())
            return self.head(rows.view(*tokens.shape, 5).tanh()).mean(1)

    def batch():
        return torch.randint(-9 if by == "index" else 0, 9, (6, 4)), torch.randint(CLASSES, (6,))

    model = Table().double()
    assert_right(model, batch())
    monkeypatch.setattr(recording, "probe", lambda *_: pytest.fail("looked for the samples again"))
    monkeypatch.setattr(recording, "GenericTerm", lambda *_: pytest.fail("no rule"))
    assert_right(model, batch())


def test_the_first_call_has_the_bits_of_later_ones():
    """A training that is resumed makes its first call later than one that was not interrupted."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.layer(self.embedding(x)).mean(1))

    torch.manual_seed(0)
    model = Encoder()
    batch = torch.randint(0, 20, (16, 7)), torch.randint(0, 3, (16,))
    direction = torch.randn(sum(p.numel() for p in model.parameters()))
    found = []
    for _ in range(2):
        model.zero_grad()
        step = weighted_step(model, batch, direction=direction, weight_fn=lambda phi: torch.sigmoid(-phi))
        found.append(torch.cat([step.phi, *(p.grad.flatten() for p in model.parameters())]))
    assert torch.equal(*found)
