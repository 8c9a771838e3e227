"""Query gradients: against materialised gradients, from one batch and from loaders."""

import pytest
import torch
from torch import nn

from kdaif_fast._data import Batches
from kdaif_fast.influence.queries import query_gradients
from tests.cases import MODELS, Dense, make
from tests.influence.cases import loader, query_rows


@pytest.mark.parametrize("queries", ["mean", "per_sample", "per_class"])
@pytest.mark.parametrize("name", MODELS)
def test_against_materialised_gradients(name, queries):
    model, val, _ = make(name)
    rows, labels = query_gradients(model, Batches(val, "val"), queries)
    truth = query_rows(Dense(model).grads(val), val[1], queries)
    expected = {"mean": [0], "per_sample": list(range(len(val[1]))), "per_class": sorted(set(val[1].tolist()))}
    assert labels == expected[queries]
    torch.testing.assert_close(rows, truth, rtol=1e-10, atol=1e-12)
    streamed, again = query_gradients(model, Batches(loader(val, 5), "val"), queries)
    assert again == labels
    torch.testing.assert_close(streamed, rows, rtol=1e-12, atol=1e-14)


def test_classes_that_are_not_in_every_batch():
    model, (x, _), _ = make("mlp")
    y = torch.tensor([2, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 0])
    rows, labels = query_gradients(model, Batches(loader((x, y), 4), "val"), "per_class")
    assert labels == [0, 2]
    torch.testing.assert_close(rows, query_rows(Dense(model).grads((x, y)), y, "per_class"))


def test_chosen_and_idle_parameters():
    model, val, _ = make("mlp")
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    rows, _ = query_gradients(model, Batches(val, "val"), "per_sample", params=["2", "idle"])
    head = Dense(model, ["2.weight", "2.bias"]).grads(val)
    torch.testing.assert_close(rows, torch.cat([torch.zeros(len(head), 2).double(), head], 1))


def test_sparse_embedding():
    model = nn.Sequential(nn.EmbeddingBag(6, 3, sparse=True, mode="sum")).double()
    val = torch.randint(6, (8, 4)), torch.randint(3, (8,))
    rows, _ = query_gradients(model, Batches(val, "val"), "mean")
    loss = nn.functional.cross_entropy(model(val[0]), val[1])
    (truth,) = torch.autograd.grad(loss, model.parameters())
    torch.testing.assert_close(rows[0], truth.to_dense().flatten())


class TestBadInput:
    def test_name(self):
        model, val, _ = make("mlp")
        with pytest.raises(ValueError, match="queries is 'each', expected one of 'mean', 'per_sample', 'per_class'"):
            query_gradients(model, Batches(val, "val"), "each")

    def test_targets_that_are_no_classes(self):
        model, (x, y), _ = make("mlp")
        with pytest.raises(
            ValueError, match=r"queries is 'per_class', but the targets of batch 0 of val are .*float64"
        ):
            query_gradients(
                model,
                Batches([(x, y.double())], "val"),
                "per_class",
                loss=lambda outputs, targets: (outputs.sum(1) - targets) ** 2,
            )

    @pytest.mark.parametrize("queries", ["mean", "per_sample", "per_class"])
    def test_a_batch_that_is_not_finite(self, queries):
        model, (x, y), _ = make("mlp")
        x[7, 1] = float("nan")
        with pytest.raises(ValueError, match="batch 1 of val: sample 2 has a loss that is not finite"):
            query_gradients(model, Batches(loader((x, y), 5), "val"), queries)

    @pytest.mark.parametrize("queries", ["mean", "per_sample"])
    def test_a_gradient_that_is_not_finite(self, queries):
        model, (x, y), _ = make("linear")

        def loss(outputs, targets):
            return (outputs.sum(1) - outputs.detach().sum(1)).abs().sqrt() + targets  # 0, with an infinite slope

        with pytest.raises(ValueError, match=r"batch 0 of val.* gradient that is not finite"):
            query_gradients(model, Batches([(x, y)], "val"), queries, loss=loss)

    def test_dropout_in_training_mode(self):
        model, val, _ = make("conv")
        with pytest.raises(ValueError, match="drops units at random"):
            query_gradients(model.train(), Batches(val, "val"), "mean")

    def test_functional_dropout(self):
        class Dropping(nn.Linear):
            def forward(self, x):
                drawn = torch.rand(())  # which alone is no harm
                return nn.functional.dropout(super().forward(x), 0.5, self.training) + 0 * drawn

        model, val = Dropping(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
        with pytest.raises(ValueError, match="the model's outputs on val are random"):
            query_gradients(model, Batches(val, "val"), "mean")
        query_gradients(model.eval(), Batches(val, "val"), "mean")


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress(progress, shown, capsys):
    """None shows it on a terminal only, which this is not."""
    model, val, _ = make("mlp")
    query_gradients(model, Batches(loader(val, 5), "val"), "mean", progress=progress)
    said = capsys.readouterr().err
    assert ("gradients of val: 100%" in said and "3/3" in said) == shown
    assert bool(said) == shown
