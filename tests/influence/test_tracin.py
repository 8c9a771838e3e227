"""TracIn: against a loop of autograd over checkpoints and samples; and the model is as it was afterwards."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast import tracin_scores
from tests.cases import MODELS, make
from tests.influence.cases import auc, digits, loader, query_rows


def states(model, count=3):
    made = []
    for _ in range(count):
        moved = {
            k: v + 0.3 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()
        }
        made.append({k: v.abs() if "running_var" in k else v for k, v in moved.items()})
    return made


def by_loop(model, batch):
    rows = []
    for x, y in zip(*batch, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_against_a_loop(name):
    model, train, val = make(name)
    checkpoints, weights = states(model, 2), [0.1, 0.03]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = []
    for state in checkpoints:
        model.load_state_dict(state)
        rows.append((by_loop(model, train), by_loop(model, val)))
    model.load_state_dict(before)
    for queries in ("mean", "per_sample", "per_class"):
        parts = [-w * own @ query_rows(other, val[1], queries).T for w, (own, other) in zip(weights, rows, strict=True)]
        expected = sum(parts)[:, 0] if queries == "mean" else sum(parts)
        options = {"checkpoints": checkpoints, "weights": weights, "queries": queries}
        phi = tracin_scores(model, train, val, **options)
        torch.testing.assert_close(phi, expected, rtol=1e-9, atol=1e-12)
        streamed = tracin_scores(model, loader(train, 5), loader(val, 3), **options)
        torch.testing.assert_close(streamed, phi, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_one_checkpoint_is_gradient_dots():
    model, train, val = make("mlp")
    phi = tracin_scores(model, train, val, checkpoints=[model.state_dict()])
    torch.testing.assert_close(phi, -by_loop(model, train) @ by_loop(model, val).mean(0))


def test_every_form_of_checkpoint(tmp_path):
    model, train, val = make("mlp")
    (state,) = states(model, 1)
    expected = tracin_scores(model, train, val, checkpoints=[state])
    torch.save(state, tmp_path / "state.pt")

    def loads(model):
        model.load_state_dict(state, assign=True)
        model[0].train()

    own = list(model.parameters())
    forms = [tmp_path / "state.pt", str(tmp_path / "state.pt"), lambda _: state, loads]
    for form in forms:
        assert torch.equal(tracin_scores(model, train, val, checkpoints=[form]), expected)
        assert all(a is b for a, b in zip(own, model.parameters(), strict=True))
        assert not any(module.training for module in model.modules())
    assert torch.equal(tracin_scores(torch.compile(model), train, val, checkpoints=[state]), expected)
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    assert torch.equal(tracin_scores(model, train, val, checkpoints=[compiled]), expected)


def test_safetensors_is_asked_for(tmp_path, monkeypatch):
    model, train, val = make("mlp")
    (tmp_path / "state.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"state\.safetensors', which needs safetensors"):
        tracin_scores(model, train, val, checkpoints=[tmp_path / "state.safetensors"])


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, train, val = make("mlp")
    (state,) = states(model, 1)
    safetensors.save_file(state, tmp_path / "state.safetensors")
    phi = tracin_scores(model, train, val, checkpoints=[tmp_path / "state.safetensors"])
    assert torch.equal(phi, tracin_scores(model, train, val, checkpoints=[state]))


def test_the_model_is_put_back_after_an_error():
    model, train, val = make("batch norm")
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own = list(model.parameters())
    train[0][4, 0] = float("inf")
    with pytest.raises(ValueError, match="batch 0 of train: sample 4 has a gradient that is not finite"):
        tracin_scores(model, loader(train, 5), val, checkpoints=states(model))

    def fails(model):
        model.load_state_dict(states(model, 1)[0], assign=True)
        model.train()
        raise OSError("no such run")

    with pytest.raises(OSError, match="no such run"):
        tracin_scores(model, val, val, checkpoints=[fails])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(a is b and a.grad is None for a, b in zip(own, model.parameters(), strict=True))
    assert not model.training


def test_wrong_labels_stand_out():
    model, data = digits()
    val = data.val_x, data.val_y
    phi = tracin_scores(model, (data.train_x, data.train_y), val, checkpoints=[model.state_dict()])
    assert auc(phi, data.flipped) > 0.6


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"checkpoints": []}, ValueError, "checkpoints is empty"),
            ({"checkpoints": "state.pt"}, TypeError, "checkpoints is a str, expected a list"),
            ({"checkpoints": {}}, TypeError, "checkpoints is a dict, expected a list"),
            ({"checkpoints": [3]}, TypeError, r"checkpoints\[0\] is a int, expected a state dict, the path"),
            ({"checkpoints": [lambda model: 3]}, TypeError, r"checkpoints\[0\] gave a int, expected a state dict"),
            ({"checkpoints": ["nowhere.pt"]}, FileNotFoundError, r"checkpoints\[0\] is 'nowhere.pt'"),
            ({"checkpoints": [{"model": {}}]}, ValueError, r"checkpoints\[0\] does not fit the model: .*\n.*0\.weight"),
            ({"weights": [1.0]}, ValueError, "weights has 1 entries, expected one for each of 2 checkpoints"),
            ({"weights": [1.0, float("nan")]}, ValueError, r"weights\[1\] is nan"),
            ({"queries": "all"}, ValueError, "queries is 'all'"),
            ({"train": iter([])}, TypeError, "train is a list_iterator"),
            ({"train": []}, ValueError, "train is empty"),
            ({"params": ["3"]}, ValueError, "params contains '3'"),
        ],
    )
    def test_message(self, change, error, message):
        model, train, val = make("mlp")
        arguments = {"train": train, "val": val, "checkpoints": [model.state_dict()] * 2, **change}
        with pytest.raises(error, match=message):
            tracin_scores(model, arguments.pop("train"), arguments.pop("val"), **arguments)

    def test_a_loader_that_shuffles(self):
        model, train, val = make("mlp")
        shuffled = DataLoader(TensorDataset(*train), batch_size=4, shuffle=True)
        with pytest.raises(ValueError, match="train is a DataLoader with a RandomSampler"):
            tracin_scores(model, shuffled, val, checkpoints=[model.state_dict()])
        with pytest.raises(ValueError, match="val is a DataLoader with a RandomSampler"):
            tracin_scores(model, train, shuffled, checkpoints=[model.state_dict()], queries="per_sample")
        tracin_scores(model, train, shuffled, checkpoints=[model.state_dict()])

    def test_complex_parameters(self):
        model, train, val = make("linear")
        model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))
        with pytest.raises(ValueError, match=r"parameter 'phase' is torch\.complex128"):
            tracin_scores(model, train, val, checkpoints=[model.state_dict()])
