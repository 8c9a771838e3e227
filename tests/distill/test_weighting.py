import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast import ConvergenceWarning, influence_scores, sigmoid_weights
from kdaif_fast.distill import InfluenceWeighting, LabelRevisionLoss, with_indices
from kdaif_fast.ops import row_stats

from .cases import SOLVE, loaders, network, samples

TIGHT = {"damping": 0.1, "tol": 1e-6}


def weighting_of(seed=0, dropout=0.0, noisy=False, **settings):
    torch.manual_seed(seed)
    model = network(dropout=dropout)
    train, val = loaders(noisy=noisy, flip=0.3)
    return InfluenceWeighting(model, train, val, **{"influence": SOLVE, **settings})


def test_weights_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = network()
    train, val = loaders(flip=0.3)
    loader = with_indices(train)
    weighting = InfluenceWeighting(model, loader, val, influence=TIGHT)
    with pytest.warns(UserWarning, match="before start_epoch"):
        assert (weighting(torch.tensor([3, 4])) == 1).all()
    assert weighting.start_epoch(0)
    x, y = train.dataset.tensors
    phi = influence_scores(model, (x, y), next(iter(val)), **TIGHT)
    torch.testing.assert_close(weighting.phi, phi, rtol=1e-4, atol=1e-5)
    for indices, _ in loader:
        torch.testing.assert_close(weighting(indices), sigmoid_weights(phi)[indices], rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was():
    weighting = weighting_of(dropout=0.5)
    before = copy.deepcopy(weighting.model.state_dict())
    weighting.start_epoch(0)
    assert all(module.training for module in weighting.model.modules())
    assert all(p.grad is None for p in weighting.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in weighting.model.state_dict().items())


def test_the_curvature_of_some_and_the_scores_of_all():
    weighting = weighting_of(solve_samples=10, influence=TIGHT)
    weighting.start_epoch(0)
    train, val = loaders(flip=0.3)
    x, y = train.dataset.tensors
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:10].sort().values
    phi = influence_scores(weighting.model, (x, y), next(iter(val)), curvature_data=(x[chosen], y[chosen]), **TIGHT)
    torch.testing.assert_close(weighting.phi, phi, rtol=1e-3, atol=1e-4)
    first = weighting.phi
    weighting.start_epoch(1)
    assert not torch.equal(first, weighting.phi)  # other samples this time


def test_random_augmentation_is_no_obstacle():
    for settings in ({}, {"solve_samples": 10}, {"refresh": "step"}):
        weighting = weighting_of(noisy=True, **settings)
        assert weighting.start_epoch(0)


@pytest.mark.parametrize("form", ["batch", "mapping", "list", "loader", "hugging face"])
def test_forms_of_validation_data(form):
    x, y, _ = samples(12, 2)
    val = {
        "batch": (x, y),
        "mapping": {"inputs": x, "targets": y},
        "list": [(x[:5], y[:5]), (x[5:], y[5:])],
        "loader": DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True),
        "hugging face": [{"input": x, "labels": y}],
    }[form]
    torch.manual_seed(0)
    model = network()
    weighting = InfluenceWeighting(model, loaders()[0], val, influence=TIGHT)
    weighting.start_epoch(0)
    reference = InfluenceWeighting(model, loaders()[0], (x, y), influence=TIGHT)
    reference.start_epoch(0)
    torch.testing.assert_close(weighting.phi, reference.phi, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train", ["data set", "list", "loader"])
def test_forms_of_training_data(train):
    x, y, _ = samples(24, 1)
    data = {
        "data set": TensorDataset(x, y),
        "list": [(x[:10], y[:10]), (x[10:], y[10:])],
        "loader": DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, drop_last=True),
    }[train]
    torch.manual_seed(0)
    weighting = InfluenceWeighting(network(), data, samples(12, 2)[:2], influence=SOLVE)
    weighting.start_epoch(0)
    assert weighting.phi.isfinite().all()
    assert len(weighting.weights) == 24


@pytest.mark.parametrize("solve_samples", [None, 15])
def test_lists_of_batches_in_any_order(solve_samples):
    """Batches that were kept of a loader that shuffles; a sample that is there twice is measured once."""
    train, val = loaders(flip=0.3)
    x, y = train.dataset.tensors
    seen = {}

    def rule(stats, phi, epoch):
        seen.update(targets=stats.targets, losses=stats.losses, indices=stats.indices)
        return sigmoid_weights(phi)

    torch.manual_seed(0)
    model = network()
    batches = [*with_indices(train)]
    batches.append(batches[1])
    weighting = InfluenceWeighting(model, batches, val, rule=rule, solve_samples=solve_samples, influence=TIGHT)
    reference = InfluenceWeighting(model, train, val, influence=TIGHT)
    weighting.start_epoch(0)
    reference.start_epoch(0)
    if solve_samples is None:
        torch.testing.assert_close(weighting.phi, reference.phi, rtol=1e-3, atol=1e-4)
    assert torch.corrcoef(torch.stack([weighting.phi, reference.phi]))[0, 1] > 0.9
    assert torch.equal(seen["indices"], torch.arange(24))
    assert torch.equal(seen["targets"], y)
    with torch.no_grad():
        torch.testing.assert_close(seen["losses"], cross_entropy(model(x), y, reduction="none"))


class TestRules:
    """What a rule of one's own is given, when all are measured and in a step."""

    def run(self, refresh, rule):
        weighting = weighting_of(refresh=refresh, rule=rule, warmup_epochs=0)
        weighting.start_epoch(3)
        if refresh == "step":
            for indices, batch in with_indices(loaders(flip=0.3)[0]):
                weighting.step(batch, indices)
        return weighting

    @pytest.mark.parametrize("refresh", ["epoch", "step"])
    def test_statistics_are_those_of_the_samples(self, refresh):
        seen = []
        x, y = loaders(flip=0.3)[0].dataset.tensors

        def rule(stats, phi, epoch):
            seen.append((stats.indices, stats.targets, stats.losses, stats.rows.student_label, stats.reference, epoch))
            return torch.ones_like(phi)

        model = self.run(refresh, rule).model
        indices, targets, losses, label, reference = (torch.cat([one[part] for one in seen]) for part in range(5))
        assert sorted(indices.tolist()) == list(range(24))
        assert torch.equal(targets, y[indices])
        with torch.no_grad():
            torch.testing.assert_close(losses, cross_entropy(model(x), y, reduction="none")[indices])
            torch.testing.assert_close(label, row_stats(model(x), None, y).student_label[indices])
        assert len(reference) in (24, 24 * len(seen))
        assert all(one[5] == 3 for one in seen)

    @pytest.mark.parametrize("refresh", ["epoch", "step"])
    @pytest.mark.parametrize(
        ("rule", "error"),
        [
            (lambda stats, phi, epoch: phi[:1], "shape"),
            (lambda stats, phi, epoch: "high", "str"),
        ],
    )
    def test_what_a_rule_returns_is_looked_at(self, rule, error, refresh):
        with pytest.raises((ValueError, TypeError), match=error):
            self.run(refresh, rule)

    @pytest.mark.parametrize("refresh", ["epoch", "step"])
    @pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
    def test_weights_that_cannot_be_used(self, bad, refresh):
        def rule(stats, phi, epoch):
            return torch.where(stats.indices == 5, bad, 0.5)

        with pytest.raises(ValueError, match=r"\{5: "):
            self.run(refresh, rule)

    @pytest.mark.parametrize("refresh", ["epoch", "step"])
    def test_weights_that_cannot_be_used_leave_those_of_before(self, refresh):
        calls = []

        def rule(stats, phi, epoch):
            calls.append(epoch)
            return torch.full_like(phi, 0.5 if epoch == 3 else -1.0)

        weighting = self.run(refresh, rule)
        before = weighting.weights, weighting.phi
        indices, batch = next(iter(with_indices(loaders(flip=0.3)[0])))
        if refresh == "step":
            weighting.start_epoch(4)
        with pytest.raises(ValueError, match="negative or not finite"):
            weighting.start_epoch(4) if refresh == "epoch" else weighting.step(batch, indices)
        assert calls[-1] == 4
        assert torch.equal(weighting.weights, before[0])
        assert torch.equal(weighting.phi, before[1])

    def test_a_rule_that_is_none(self):
        with pytest.raises(TypeError, match="rule is a float"):
            weighting_of(rule=0.5)


def test_a_step_is_one_pass_with_the_weights_in_it():
    weighting = weighting_of(refresh="step", influence=TIGHT)
    weighting.start_epoch(0)
    assert weighting.is_one_pass
    indices, (x, y) = next(iter(with_indices(loaders(flip=0.3)[0])))
    result = weighting.step((x, y), indices)
    model = copy.deepcopy(weighting.model)
    model.zero_grad()
    (weighting(indices) * cross_entropy(model(x), y, reduction="none")).mean().backward()
    for p, expected in zip(weighting.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weighting.phi[indices], result.phi)
    assert weighting.measurements == []
    weighting.start_epoch(1)
    (epoch, phi), *_ = weighting.measurements
    assert epoch == 0
    assert int(phi.isfinite().sum()) == len(indices)


def test_its_state_goes_into_another_one():
    first = weighting_of(refresh="step", ema=0.5, normalize=True, rule="keep_probability")
    loader = with_indices(loaders(flip=0.3, shuffle=False)[0])
    first.start_epoch(0)
    batches = list(loader)
    first.step(batches[0].batch, batches[0].indices)
    second = weighting_of(7, refresh="step", ema=0.5, normalize=True, rule="keep_probability")
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for weighting in (first, second):
        weighting.step(batches[1].batch, batches[1].indices)
        weighting.start_epoch(1)
        weighting.step(batches[0].batch, batches[0].indices)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.phi.nan_to_num(9), second.phi.nan_to_num(9))
    assert len(first.measurements) == len(second.measurements) == 1


def test_only_the_last_measurements_are_kept():
    weighting = weighting_of(history=2)
    for epoch in range(4):
        weighting.start_epoch(epoch)
    assert [epoch for epoch, _ in weighting.measurements] == [2, 3]


def test_a_solve_that_went_nowhere_is_told(monkeypatch):
    monkeypatch.setattr("kdaif_fast.distill.weighting.POOR_RESIDUAL", 0.2)
    weighting = weighting_of(influence={"tol": 1e-6, "max_iter": 1, "damping": 1e-6})
    with pytest.warns(ConvergenceWarning, match="relative residual"):
        weighting.start_epoch(0)
    assert weighting.record["iterations"] == 1


def test_a_rough_solve_is_no_matter():
    assert weighting_of(influence={"tol": None, "max_iter": 10}).start_epoch(0)


def test_losses_that_weigh_their_terms_want_full_refreshes():
    with pytest.raises(ValueError, match="LabelRevisionLoss weighs its terms by itself"):
        weighting_of(refresh="step", loss=LabelRevisionLoss())


def test_only_some_parameters():
    weighting = weighting_of(params="0", refresh="step")
    weighting.start_epoch(0)
    indices, batch = next(iter(with_indices(loaders()[0])))
    weighting.step(batch, indices)
    assert isinstance(weighting.model, nn.Sequential)
    assert weighting.model[2].weight.grad is None
