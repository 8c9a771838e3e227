"""Products with samples shared out over processes, against one process that has them all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.curvature import EmpiricalFisher, GaussNewton, Hessian, MonteCarloFisher
from tests.cases import make
from tests.curvature.test_dense_truth import error
from tests.distributed.processes import start

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

OPERATORS = [GaussNewton, Hessian, EmpiricalFisher]
SHARES = {2: [(5, 7), (0, 12)], 3: [(1, 9, 2), (4, 0, 8)]}
"""How many samples each rank has."""


def problem():
    torch.manual_seed(0)
    model, batch, val = make("mlp")
    V = torch.randn(3, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    return model, batch, val, V


def share(batch, sizes, rank):
    return tuple(part.split(sizes)[rank] for part in batch)


def loader(batch):
    """An empty share is a list without a batch."""
    return DataLoader(TensorDataset(*batch), 3) if len(batch[0]) else []


def check_products(rank, world):
    model, batch, _, V = problem()
    for sizes in SHARES[world]:
        mine = share(batch, sizes, rank)
        for operator in OPERATORS:
            alone = operator(model, batch)
            expected = alone.matmat(V)
            ways = [{"data": loader(mine)}, {"data": loader(mine), "keep_graphs": True, "memory": 1}]
            # One batch here, a loader there: a rank without samples has no batch.
            ways.append({"data": mine if len(mine[0]) else []})
            for options in ways:
                made = operator(model, group="world", **options)
                for _ in range(2):
                    assert error(made.matmat(V), expected) < 1e-12
                assert error(made.matvec(V[0]), expected[0]) < 1e-12
                assert made.samples == len(batch[0])
                assert operator(model, group=distributed.group.WORLD, **options).samples == len(batch[0])
                assert made.mean_eigenvalue() == pytest.approx(alone.mean_eigenvalue(), rel=1e-9)
                assert error(made.diagonal(8), alone.diagonal(8)) < 1e-9
    check_draws(rank, model, batch, V)
    check_failures(rank, world, model, batch)
    check_groups(rank, model, batch, V)


def check_draws(rank, model, batch, V):
    """Every rank draws for itself: the same samples on two ranks have other targets."""
    made = MonteCarloFisher(model, batch, group="world")
    product = made.matmat(V)
    assert torch.equal(made.matmat(V), product)
    assert error(product, MonteCarloFisher(model, batch).matmat(V)) > 0.01
    everywhere = [torch.empty_like(product) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, product)
    assert all(torch.equal(other, product) for other in everywhere)


def check_failures(rank, world, model, batch):
    """What one rank raises, all raise, and then they can go on together."""
    bad = (batch[0].clone(), batch[1])
    if rank == 1:
        bad[0][5] = torch.nan
    message = "sample 5 has the loss nan" if rank == 1 else r"1 other rank\(s\) of the group failed"
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match=message):
        GaussNewton(model, bad, group="world")  # one batch: at once
    streamed = GaussNewton(model, list(zip(*(part.split(4) for part in bad), strict=True)), group="world")
    message = "batch 1 of data: sample 1" if rank == 1 else r"1 other rank\(s\) of the group failed"
    for _ in range(2):
        with pytest.raises(ValueError if rank == 1 else RuntimeError, match=message):
            streamed.matvec(torch.ones(43))  # a loader: when it is gone through
        with pytest.raises(ValueError if rank == 1 else RuntimeError, match=message):
            _ = streamed.samples
    with pytest.raises(ValueError, match="data is empty on every rank"):
        GaussNewton(model, [], group="world").matvec(torch.ones(43))
    with pytest.raises(ValueError, match="group is 'all', expected a process group, 'world' or None"):
        GaussNewton(model, batch, group="all")
    assert GaussNewton(model, batch, group="world").samples == world * len(batch[0])


def check_groups(rank, model, batch, V):
    """A group of some of the processes: the others are not asked."""
    pair = distributed.new_group([0, 1])
    if rank < 2:
        made = GaussNewton(model, share(batch, (10, 2), rank), group=pair)
        assert error(made.matmat(V), GaussNewton(model, batch).matmat(V)) < 1e-12


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_products(world):
    start(check_products, world)


@pytest.mark.slow
def test_torchrun():
    """The same, started as users start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    path = Path(__file__).with_name("torchrun_curvature.py")
    subprocess.run([*command, str(path)], check=True, timeout=300, cwd=path.parents[2])
