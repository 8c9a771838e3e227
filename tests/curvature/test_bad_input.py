"""What operators say of vectors, data and samples that they cannot work with."""

import pytest
import torch
from torch import nn

from kdaif_fast.curvature import EmpiricalFisher, GaussNewton, Hessian, MonteCarloFisher, hvp, make_curvature
from tests.cases import make
from tests.test_data import Changing

OPERATORS = [GaussNewton, Hessian, EmpiricalFisher, MonteCarloFisher]


def loader(batch, *sizes):
    return list(zip(*(part.split(sizes) for part in batch), strict=True))


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(2, 3), r"directions has shape \(2, 3\), expected \(K, 15\)"),
        (torch.ones(15), r"directions has shape \(15,\), expected \(K, 15\)"),
        ({"weight": torch.ones(2, 3, 4)}, "differ in their names: bias"),
        (
            {"weight": torch.ones(2, 3, 4), "bias": torch.ones(3)},
            r"directions\['bias'\] has shape \(3,\), expected \(2, 3\)",
        ),
        (
            {"weight": torch.ones(2, 3, 4), "bias": torch.ones(1, 3)},
            r"directions\['bias'\] has shape \(1, 3\), expected \(2, 3\)",
        ),
    ],
)
def test_vectors_that_do_not_fit(directions, message):
    model, batch, _ = make("linear")
    with pytest.raises(ValueError, match=message):
        GaussNewton(model, batch).matmat(directions)


def test_hvp_names_the_entry():
    model, batch, _ = make("linear")
    with pytest.raises(ValueError, match=r"direction\w*\['bias'\] has shape \(4,\), expected \(3,\)"):
        hvp(model, batch, {"weight": torch.ones(3, 4), "bias": torch.ones(4)})
    with pytest.raises(ValueError, match=r"shape \(2, 2, 15\)"):
        hvp(model, batch, torch.ones(2, 2, 15))
    with pytest.raises(ValueError, match="curvature is 'newton', expected one of 'ggn', 'hessian'"):
        hvp(model, batch, torch.ones(15), curvature="newton")
    with pytest.raises(ValueError, match=r"curvature is \['ggn'\]"):
        make_curvature(["ggn"], model, batch)


@pytest.mark.parametrize("operator", OPERATORS)
class TestData:
    def test_loader_without_a_batch(self, operator):
        model, _, _ = make("linear")
        with pytest.raises(ValueError, match="data is empty: it gave no batch"):
            operator(model, []).matvec(torch.ones(15))

    def test_something_that_can_be_gone_through_once(self, operator):
        model, batch, _ = make("linear")
        with pytest.raises(TypeError, match="data is a list_iterator, which can be gone through only once"):
            operator(model, iter(loader(batch, 6, 6)))

    def test_passes_of_different_length(self, operator):
        model, batch, _ = make("linear")
        made = operator(model, Changing(loader(batch, 6, 6), loader(batch, 6, 4, 2), loader(batch, 6, 6)[:1]))
        made.matvec(torch.ones(15))
        with pytest.raises(ValueError, match="data gave 3 batches with 12 samples, but 2 with 12 when"):
            made.matvec(torch.ones(15))
        with pytest.raises(ValueError, match="data gave 1 batches with 6 samples, but 2 with 12 when"):
            made.matvec(torch.ones(15))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_the_sample_that_is_not_finite(self, operator, bad):
        model, batch, _ = make("linear")
        batch[0][8, 1] = bad
        with pytest.raises(ValueError, match="batch 2 of data: sample 1 has the loss nan"):
            operator(model, loader(batch, 3, 4, 5)).matvec(torch.ones(15))
        with pytest.raises(ValueError, match="data: sample 8 has the loss nan"):
            operator(model, batch)

    def test_memory_and_model(self, operator):
        model, batch, _ = make("linear")
        with pytest.raises(ValueError, match="memory is 0, expected a positive number of bytes"):
            operator(model, batch, memory=0)
        with pytest.raises(ValueError, match="model is None"):
            operator(None, batch)
        with pytest.raises(RuntimeError, match=r"group is 'world', but torch.distributed is not initialised"):
            operator(model, batch, group="world")

    def test_probes(self, operator):
        model, batch, _ = make("linear")
        for estimate in (operator(model, batch).diagonal, operator(model, batch).mean_eigenvalue):
            with pytest.raises(ValueError, match="probes is 0, expected at least 1"):
                estimate(probes=0)


def test_a_gradient_that_is_not_finite():
    """The loss may still be a number."""
    model, (x, y), _ = make("linear")

    def loss(outputs, targets):
        return (outputs[:, 0] * (targets != 2)).abs().sqrt()

    index = int((y == 2).nonzero()[0])
    with pytest.raises(ValueError, match=f"data: sample {index} has the loss 0.0, or a gradient that is not finite"):
        GaussNewton(model, (x, y), loss=loss)


def test_too_large_for_a_matrix():
    model = nn.Linear(200, 200)
    operator = GaussNewton(model, (torch.randn(2, 200), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"the matrix of 40,200 parameters would take 6 GB; .* up to 20,000"):
        operator.dense()


@pytest.mark.parametrize("options", [{"draws": 0}, {"likelihood": "poisson"}])
def test_draws(options):
    model, batch, _ = make("linear")
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is {next(iter(options.values()))!r}, expected"):
        MonteCarloFisher(model, batch, **options)
