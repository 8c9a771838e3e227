"""DataInf: against its formula on materialised gradients."""

import pytest
import torch
from torch import nn

from kdaif_fast import datainf_scores
from tests.cases import MODELS, Dense, make
from tests.influence.cases import auc, digits, loader, query_rows


def brute_force(model, train, val, damping, queries):
    """By the inverse of every sample's matrix, where the library has the Sherman-Morrison formula."""
    dense = Dense(model)
    own, other = dense.grads(train), query_rows(dense.grads(val), val[1], queries)
    phi, start = 0, 0
    for parameter in dense.parameters.values():
        here = slice(start, start := start + parameter.numel())
        g, v = own[:, here], other[:, here]
        lam = damping if damping != "auto" else 0.1 * float(g.square().sum(1).mean()) / g.shape[1]
        identity = torch.eye(g.shape[1], dtype=g.dtype)
        s = torch.stack([torch.linalg.solve(torch.outer(row, row) + lam * identity, v.T) for row in g]).mean(0)
        phi = phi - g @ s
    return phi[:, 0] if queries == "mean" else phi


@pytest.mark.parametrize("damping", ["auto", 0.01])
@pytest.mark.parametrize("name", MODELS)
def test_against_brute_force(name, damping):
    model, train, val = make(name)
    for queries in ("mean", "per_sample", "per_class"):
        phi = datainf_scores(model, train, val, damping=damping, queries=queries)
        expected = brute_force(model, train, val, damping, queries)
        torch.testing.assert_close(phi, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
        streamed = datainf_scores(model, loader(train, 5), loader(val, 3), damping=damping, queries=queries)
        torch.testing.assert_close(streamed, phi, rtol=1e-12, atol=1e-12 * float(phi.abs().max()))


def test_parameters_without_gradients_say_nothing():
    model, train, val = make("mlp")
    expected = datainf_scores(model, train, val)
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    assert torch.equal(datainf_scores(model, train, val), expected)
    still = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    still[0].bias.data.fill_(-100)  # the first layer's gradients are zero for every sample
    head = datainf_scores(still, train, val, params="2.bias")
    assert torch.equal(datainf_scores(still, train, val), head)
    for queries in ("per_sample", "per_class"):
        assert datainf_scores(still, train, val, queries=queries).isfinite().all()


def test_wrong_labels_stand_out():
    model, data = digits()
    phi = datainf_scores(model, (data.train_x, data.train_y), (data.val_x, data.val_y))
    assert auc(phi, data.flipped) > 0.6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"damping": 0}, ValueError, "damping is 0, expected a number > 0"),
        ({"damping": "much"}, TypeError, "damping is 'much'"),
        ({"damping": True}, TypeError, "damping is True"),
        ({"queries": "all"}, ValueError, "queries is 'all'"),
        ({"train": []}, ValueError, "train is empty"),
        ({"params": []}, ValueError, "params is empty"),
    ],
)
def test_bad_input(change, error, message):
    model, train, val = make("mlp")
    arguments = {"train": train, "val": val, **change}
    with pytest.raises(error, match=message):
        datainf_scores(model, arguments.pop("train"), arguments.pop("val"), **arguments)


def test_a_sample_that_is_not_finite():
    model, train, val = make("linear")
    train[0][7, 2] = float("nan")
    for damping in ("auto", 0.1):
        with pytest.raises(ValueError, match="batch 1 of train: sample 2 has a loss that is not finite"):
            datainf_scores(model, loader(train, 5), val, damping=damping)
