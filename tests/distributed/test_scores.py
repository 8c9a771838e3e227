"""Solves and influence scores with samples shared out over processes, against one process that has them all."""

import copy

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast import influence_scores
from kdaif_fast._data import Batches
from kdaif_fast.curvature import EKFAC, GaussNewton, Hessian
from kdaif_fast.influence import rank as ranking
from kdaif_fast.influence.validation import validation_gradients
from kdaif_fast.solvers import solve
from tests.curvature.test_dense_truth import error
from tests.distributed.processes import start
from tests.distributed.test_curvature import problem, share

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

SHARES = {2: ((5, 7), (4, 3)), 3: ((1, 9, 2), (2, 4, 1))}
"""How many training and validation samples each rank has."""

SAME = 1e-6
DAMPING = 0.1


def loader(batch):
    return DataLoader(TensorDataset(*batch), 2)


def check(rank, world):
    model, batch, val, V = problem()
    mine, mine_val = (
        share(all_of_them, sizes, rank) for all_of_them, sizes in zip((batch, val), SHARES[world], strict=True)
    )
    check_solves(model, batch, mine, V)
    check_gradients(model, val, mine_val)
    check_scores(rank, SHARES[world][0], model, batch, val, mine, mine_val)
    check_failures(rank, model, mine, mine_val)


def check_solves(model, batch, mine, V):
    for operator, method, options in (
        (GaussNewton, "cg", {"tol": 1e-8}),
        (GaussNewton, "exact", {}),
        (GaussNewton, "nystrom", {"rank": 20, "tol": None}),
        (GaussNewton, "lanczos", {"rank": 20, "tol": None}),
        (Hessian, "minres", {"tol": 1e-8}),
    ):
        alone, shared = operator(model, batch), operator(model, loader(mine), group="world")
        expected, found = (solve(made, V, method, damping=DAMPING, **options) for made in (alone, shared))
        assert error(found.x, expected.x) < SAME
        assert found.iterations == expected.iterations
        assert solve(shared, V[0], "cg").damping == pytest.approx(solve(alone, V[0], "cg").damping, rel=SAME)


def check_gradients(model, val, mine):
    """The right-hand sides: the same on all ranks, from shards of unequal size."""
    for queries in ("mean", "per_sample", "per_class"):
        for data in (mine, loader(mine)):
            options = {"loss": None, "params": None, "progress": False}
            found, labels = validation_gradients(model, Batches(data, "val"), queries, group="world", **options)
            expected, names = validation_gradients(model, Batches(val, "val"), queries, group=None, **options)
            assert labels == names
            assert error(found, expected) < SAME


def check_scores(rank, sizes, model, batch, val, mine, mine_val):
    """Every rank gets the scores of its own samples."""
    for options in (
        {"queries": "mean", "tol": 1e-9},
        {"queries": "per_sample", "tol": 1e-9},
        {"queries": "per_class", "solver": "exact"},
        {"curvature": "hessian", "damping": 0.5, "tol": 1e-9},
        {"curvature": "identity"},
        {"damping": "auto", "tol": 1e-9},
    ):
        options = {"damping": DAMPING, **options}
        expected = influence_scores(model, batch, val, **options).split(sizes)[rank]
        for data in (mine, loader(mine)):
            assert error(influence_scores(model, data, loader(mine_val), group="world", **options), expected) < SAME


def no_room(*arguments):
    raise MemoryError("no room")


class Rankless:
    """A linearisation that cannot be used."""

    dots = no_room


def check_failures(rank, model, mine, mine_val):
    """What one rank raises while it goes through its data, all raise; nobody waits."""
    bad = (mine_val[0] * torch.nan, mine_val[1])
    other = (RuntimeError, r"other rank\(s\) of the group failed")
    for train, val, message in (
        ([], mine_val, "batch is empty"),
        (mine, [], "val is empty"),
        (mine, bad, "val: sample 0 has"),
        (loader(mine), loader(bad), "batch 0 of val"),
        (DataLoader(TensorDataset(*mine), 2, shuffle=True), mine_val, "shuffle"),
    ):
        kind, text = (ValueError, message) if rank == 0 else other
        with pytest.raises(kind, match=text):
            influence_scores(model, *((train, val) if rank == 0 else (mine, mine_val)), damping=DAMPING, group="world")
    # Other models or settings: all raise the same.
    other_model = copy.deepcopy(model)
    with torch.no_grad():
        next(other_model.parameters()).add_(rank)
    for changed, options, message in (
        (other_model, {}, "values of the model: "),
        (model, {"damping": 0.1 + rank}, "damping: 0.1 on the first rank of the group, but 1.1 on that of number 1"),
        (model, {"curvature": "ekfac" if rank else "ggn"}, "curvature: 'ggn' on the first rank"),
        (model, {"queries": "mean" if rank else "per_class"}, "queries: 'per_class' on the first rank"),
        (model, {"params": list(dict(model.named_parameters()))[rank:]}, "parameters that influence is over: "),
    ):
        with pytest.raises(ValueError, match=message):
            influence_scores(changed, mine, mine_val, group="world", **options)
    # While tol="rank" makes what it looks at, and while it looks.
    kept = ranking.Objective
    for broken in (no_room, lambda *arguments: Rankless()):
        kind, text = (MemoryError, "no room") if rank == 0 else other
        ranking.Objective = broken if rank == 0 else kept
        try:
            with pytest.raises(kind, match=text):
                influence_scores(model, mine, mine_val, damping=1e-4, tol="rank", group="world")
        finally:
            ranking.Objective = kept
    kind, text = (ValueError, "data: sample 0 has the loss nan") if rank == 0 else other
    with pytest.raises(kind, match=text):
        EKFAC(model, (mine[0] * torch.nan, mine[1]) if rank == 0 else mine, group="world").mean_eigenvalue()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_scores(world):
    start(check, world)
