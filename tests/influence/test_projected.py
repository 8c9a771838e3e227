"""Scores from projected gradients: exact where nothing is lost, streamed, kept in files, averaged over checkpoints."""

import numpy as np
import pytest
import torch
from torch import nn

from kdaif_fast import ProjectedGradients, projected_scores
from tests.cases import MODELS, Dense, make
from tests.influence.cases import auc, digits, loader, query_rows


def exact(own, other, damping):
    """Influence with the empirical Fisher matrix of gradients [N, P]."""
    kernel = own.T @ own / len(own)
    lam = damping if damping != "auto" else 0.1 * kernel.diagonal().mean()
    return -own @ torch.linalg.solve(kernel + lam * torch.eye(len(kernel), dtype=kernel.dtype), other.T)


@pytest.mark.parametrize("method", ["dense", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_as_many_dimensions_as_parameters(name, method):
    """The empirical Fisher matrix, or its diagonal blocks."""
    model, train, val = make(name)
    dense = Dense(model)
    own, other = dense.grads(train), dense.grads(val)
    for queries, damping in (("mean", 0.01), ("per_sample", "auto"), ("per_class", 0.1)):
        rows = query_rows(other, val[1], queries)
        sizes = [p.numel() for p in dense.parameters.values()]
        blocks = [(own, rows)] if method == "dense" else zip(own.split(sizes, 1), rows.split(sizes, 1), strict=True)
        expected = sum(exact(*block, damping) for block in blocks)
        expected = expected[:, 0] if queries == "mean" else expected
        options = dict(queries=queries, damping=damping, method=method, dims=10_000)
        phi = projected_scores(model, train, val, **options)
        torch.testing.assert_close(phi, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["dense", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_loaders(name, method):
    model, train, val = make(name)
    for queries in ("mean", "per_sample", "per_class"):
        options = dict(queries=queries, method=method, dims=6)
        phi = projected_scores(model, train, val, **options)
        streamed = projected_scores(model, loader(train, 5), loader(val, 3), **options)
        torch.testing.assert_close(streamed, phi, rtol=1e-11, atol=1e-12 * float(phi.abs().max()))


def test_seeds_and_kinds_differ():
    model, train, val = make("mlp")
    made = [
        projected_scores(model, train, val, dims=4, seed=seed, projection=kind)
        for seed, kind in ((0, "normal"), (0, "normal"), (1, "normal"), (0, "rademacher"))
    ]
    assert torch.equal(made[0], made[1])
    assert not made[0].allclose(made[2])
    assert not made[0].allclose(made[3])
    state = torch.get_rng_state()
    projected_scores(model, train, val, dims=4)
    assert torch.equal(state, torch.get_rng_state())


def test_checkpoints_are_averaged():
    model, train, val = make("mlp")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = [{k: v + 0.3 * torch.randn_like(v) for k, v in before.items()} for _ in range(2)]
    phi = projected_scores(model, train, val, dims=6, checkpoints=states)
    each = []
    for seed, state in enumerate(states):
        model.load_state_dict(state)
        each.append(projected_scores(model, train, val, dims=6, seed=seed))
    model.load_state_dict(before)
    torch.testing.assert_close(phi, (each[0] + each[1]) / 2)
    train[0][3, 1] = float("nan")
    with pytest.raises(ValueError, match="train: sample 3"):
        projected_scores(model, train, val, dims=6, checkpoints=states)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["dense", "factored"])
def test_features_in_a_file(tmp_path, method):
    model, train, val = make("conv")
    settings = dict(method=method, dims=6, seed=3)
    projected = ProjectedGradients(model, loader(train, 5), **settings)
    written = ProjectedGradients(model, loader(train, 5), folder=tmp_path / "a", **settings)
    projected.save(tmp_path / "b")
    for folder in ("a", "b"):
        assert np.array_equal(np.load(tmp_path / folder / "features.npy"), projected.features.numpy())
    expected = projected.scores(val, queries="per_class")
    for other in (
        written,
        ProjectedGradients.load(tmp_path / "a", model),
        ProjectedGradients.load(tmp_path / "b", model),
    ):
        assert torch.equal(other.features, projected.features)
        assert torch.equal(other.scores(val, queries="per_class"), expected)


def test_features_are_written_over_those_that_are_in_use(tmp_path):
    model, train, val = make("mlp")
    first = ProjectedGradients(model, train, dims=6, folder=tmp_path)
    features, expected = first.features.clone(), first.scores(val)
    first.save(tmp_path)
    other = ProjectedGradients(model, train, dims=6, seed=1, folder=tmp_path)
    assert not torch.equal(other.features, features)
    assert torch.equal(first.features, features)
    assert torch.equal(first.scores(val), expected)
    train[0][3, 1] = float("nan")
    with pytest.raises(ValueError, match="sample 3"):
        ProjectedGradients(model, train, dims=6, folder=tmp_path)
    assert torch.equal(ProjectedGradients.load(tmp_path, model).features, other.features)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features.npy", "settings.json"]


def test_files_that_do_not_fit(tmp_path):
    model, train, _ = make("mlp")
    ProjectedGradients(model, train, dims=6, folder=tmp_path)
    with pytest.raises(ValueError, match=r"are of a model with 0\.weight \[5, 4\]"):
        ProjectedGradients.load(tmp_path, make("linear")[0])
    changed = make("mlp")[0]
    with pytest.raises(ValueError, match="the model is not as it was when the features were made"):
        ProjectedGradients.load(tmp_path, changed)
    with pytest.raises(FileNotFoundError, match=r"has no settings\.json"):
        ProjectedGradients.load(tmp_path / "elsewhere", model)
    with (tmp_path / "features.npy").open("r+b") as file:
        file.write(b"\0" * 128)  # what a process that was killed leaves
    with pytest.raises(ValueError, match="was not written to its end"):
        ProjectedGradients.load(tmp_path, model)


def test_a_model_that_was_trained_further():
    model, train, val = make("mlp")
    projected = ProjectedGradients(model, train, dims=6)
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="its parameters have changed"):
        projected.scores(val)


def test_chosen_and_idle_parameters():
    model, train, val = make("mlp")
    head = projected_scores(model, train, val, params="2", dims=6)
    model[0].requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    names = ["2.weight", "2.bias"]
    alone = ProjectedGradients(model, train, params=names, dims=6)
    assert torch.equal(alone.scores(val), head)
    assert list(alone.blocks) == names
    expected = projected_scores(model, train, val, params="2", dims=10_000)
    phi = projected_scores(model, train, val, params=[*names, "idle"], dims=10_000)
    torch.testing.assert_close(phi, expected)


@pytest.mark.parametrize("method", ["dense", "factored"])
def test_wrong_labels_stand_out(method):
    model, data = digits()
    phi = projected_scores(
        model, (data.train_x, data.train_y), (data.val_x, data.val_y), method=method, dims=256, damping=0.01
    )
    assert auc(phi, data.flipped) > 0.6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "trak"}, ValueError, "method is 'trak', expected one of 'factored', 'dense'"),
        ({"projection": "sparse"}, ValueError, "projection is 'sparse', expected one of 'normal', 'rademacher'"),
        ({"dims": 0}, ValueError, "dims is 0"),
        ({"dims": 2.5}, TypeError, "dims is 2.5"),
        ({"damping": -1}, ValueError, "damping is -1"),
        ({"damping": "much"}, TypeError, "damping is 'much'"),
        ({"damping": 0, "dims": 10_000}, ValueError, "damping is 0, too little to invert"),
        ({"queries": "all"}, ValueError, "queries is 'all'"),
        ({"checkpoints": []}, ValueError, "checkpoints is empty"),
        ({"train": []}, ValueError, "train is empty"),
        ({"val": iter([])}, TypeError, "val is a list_iterator"),
        ({"params": ["3"]}, ValueError, "params contains '3'"),
    ],
)
def test_bad_input(change, error, message):
    model, train, val = make("mlp")
    arguments = {"train": train, "val": val, **change}
    with pytest.raises(error, match=message):
        projected_scores(model, arguments.pop("train"), arguments.pop("val"), **arguments)
