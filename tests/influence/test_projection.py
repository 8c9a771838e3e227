"""Random projections: the same from factors as from formed gradients, and right on average."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdaif_fast._model import Batch
from kdaif_fast.influence.gradients import record, sample_gradients
from kdaif_fast.influence.projection import DenseProjection, FactoredProjection
from tests.cases import MODELS, Dense, make


class Sequences(nn.Module):
    """Layers that see several positions of a sample, in several orders; a transposed use of a tied weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.inner = nn.Linear(6, 6)
        self.turned = nn.Parameter(torch.randn(6, 5))
        self.wide = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose1d(4, 6, 3, padding=1)

    def forward(self, tokens):
        x = torch.tanh(self.inner(self.table(tokens)))
        x = self.back(torch.tanh(self.wide(x.mT))).mT
        return x.mean(1) @ self.inner.weight @ self.turned


def sequences():
    return Sequences().double().eval(), (torch.randint(9, (7, 8)), torch.randint(5, (7,)))


def strided():
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2), nn.Flatten(), nn.Linear(32, 4)
    return nn.Sequential(*layers).double(), (torch.randn(6, 3, 6, 6).double(), torch.randint(4, (6,)))


OTHERS = {"sequences": sequences, "strided": strided}


def case(name):
    return OTHERS[name]() if name in OTHERS else make(name)[:2]


@pytest.mark.parametrize("dims", [1, 3, 9, 16])
@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_factors_against_formed_gradients(name, dims):
    model, batch = case(name)
    recording = record(model, Batch(*batch), None, None, "batch")
    projection = FactoredProjection(recording.parameters, dims, "normal", 0)
    dense = Dense(model)
    grads = dense.grads(batch)
    pieces = grads.split([p.numel() for p in dense.parameters.values()], 1)
    expected = [
        projection.of_gradients(name, piece.view(len(piece), *dense.parameters[name].shape))
        for name, piece in zip(dense.parameters, pieces, strict=True)
    ]
    assert all(part.shape[1] <= dims for part in expected)
    torch.testing.assert_close(projection.features(recording), torch.cat(expected, 1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_dense_is_one_matrix(name):
    """R is read off gradients that are projected one by one, and does not depend on how much of it is kept."""
    model, batch = case(name)
    grads = sample_gradients(record(model, Batch(*batch), None, None, "batch"))
    torch.testing.assert_close(grads, Dense(model).grads(batch), rtol=1e-9, atol=1e-11)
    parameters = dict(model.named_parameters())
    kept = DenseProjection(parameters, 5, "rademacher", 3, memory=1 << 20)
    features = kept.features(record(model, Batch(*batch), None, None, "batch"))
    again = DenseProjection(parameters, 5, "rademacher", 3, memory=0).features(
        record(model, Batch(*batch), None, None, "batch")
    )
    assert torch.equal(features, again)
    matrix = torch.cat([kept._matrix(name, 0, p.numel()) for name, p in parameters.items()], 1)
    assert matrix.square().allclose(torch.full_like(matrix, 1 / 5))
    torch.testing.assert_close(features, grads @ matrix.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("method", ["dense", "factored"])
def test_dot_products_are_right_on_average(method, kind):
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    batch = torch.randn(6, 12).double(), torch.randint(5, (6,))
    grads = Dense(model).grads(batch)
    truth = grads @ grads.T
    estimates = []
    for seed in range(400):
        recording = record(model, Batch(*batch), None, None, "batch")
        projection = {
            "dense": lambda p, s: DenseProjection(p, 8, kind, s, memory=1 << 20),
            "factored": lambda p, s: FactoredProjection(p, 9, kind, s),
        }[method](recording.parameters, seed)
        features = projection.features(recording)
        estimates.append(features @ features.T)
    estimates = torch.stack(estimates)
    error, spread = estimates.mean(0) - truth, estimates.std(0) / 20
    assert (spread < 0.15 * truth.diagonal().mean()).all()
    assert (error.abs() < 4.5 * spread).all()
    assert (estimates.std(0) > 0.02 * truth.diagonal().mean()).any()  # they are random at all


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_enough_dimensions_change_nothing(name):
    model, batch = case(name)
    grads = Dense(model).grads(batch)
    for build in (
        lambda p: DenseProjection(p, 10_000, "normal", 0, 0),
        lambda p: FactoredProjection(p, 10_000, "normal", 0),
    ):
        recording = record(model, Batch(*batch), None, None, "batch")
        projection = build(recording.parameters)
        assert projection.size == grads.shape[1]
        torch.testing.assert_close(projection.features(recording), grads, rtol=1e-9, atol=1e-11)


def test_half_precision_is_projected_in_float32():
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)).bfloat16()
    batch = torch.randn(6, 12).bfloat16(), torch.randint(5, (6,))
    for projection in (
        FactoredProjection(dict(model.named_parameters()), 9, "normal", 0),
        DenseProjection(dict(model.named_parameters()), 9, "normal", 0, 1 << 20),
    ):
        features = projection.features(
            record(model, Batch(*batch), lambda z, y: F.cross_entropy(z.float(), y, reduction="none"), None, "batch")
        )
        assert features.dtype == torch.float32
        assert features.isfinite().all()
        assert features.any()
