"""Weighting under DistributedDataParallel on two processes, against one process that has all samples."""

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from kdaif_fast.distill.indexed import with_indices
from kdaif_fast.distill.weighting import InfluenceWeighting
from tests.distributed.processes import start

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

N, VAL = 25, 9
"""Both odd: a DistributedSampler repeats a sample of each."""

TIGHT = {"tol": 1e-10, "max_iter": 400, "damping": 0.1}
SAME = 1e-6


def problem(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    train, val = (TensorDataset(torch.randn(m, 5).double(), torch.randint(3, (m,))) for m in (n, VAL))
    return model, train, val


def weightings(n, **options):
    """(of one process with all samples, of this one with its share), with their models and the sampler."""
    found = []
    for shared in (False, True):
        model, train, val = problem(n)
        if shared:
            model = DistributedDataParallel(model)
        samplers = [
            DistributedSampler(data, shuffle=at == 0) if shared else None for at, data in enumerate((train, val))
        ]
        loaders = [DataLoader(data, 4, sampler=sampler) for data, sampler in zip((train, val), samplers, strict=True)]
        made = InfluenceWeighting(
            model, with_indices(loaders[0]), loaders[1], influence=TIGHT, group="world" if shared else None, **options
        )
        found.append((made, model, samplers[0], train))
    return found


def check_epochs(rank, world):
    """Weights of all samples are the same, measured at parameters that the weights before have led to."""
    for options in (
        {"ema": 0.5, "combine": "mean", "normalize": True},
        {"rule": "keep_probability"},  # draws at random
        {"refresh": 1, "rule": lambda stats, phi, epoch: 1 / (1 + stats.losses) + stats.rows.student_entropy},
    ):
        (alone, plain, _, train), (shared, model, sampler, _) = weightings(N, **options)
        assert len(shared._own_places()) == (13, 12)[rank]
        loader = with_indices(DataLoader(train, 13, sampler=sampler))
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for made in (alone, shared):
                assert made.start_epoch(epoch) == (made.refresh_schedule == "epoch")
            for indices, (x, y) in loader:
                for made in (alone, shared):
                    made.start_step(epoch)
                torch.testing.assert_close(shared.weights, alone.weights, rtol=SAME, atol=SAME)
                torch.testing.assert_close(shared.phi, alone.phi, rtol=SAME, atol=SAME * float(alone.phi.abs().max()))
                (shared(indices) * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
                whole = torch.cat(gathered(indices))
                x, y = train[whole]
                (alone(whole) * F.cross_entropy(plain(x), y, reduction="none")).mean().backward()
                take_steps(plain, model)
        assert len(shared.weights.unique()) > 1


def check_steps(rank, world):
    """One pass on each rank gives the gradients of one pass over both batches; what one has found the other knows."""
    n = N - 1  # no sample is repeated, whose weights would be averaged in another order
    (alone, plain, _, train), (shared, model, sampler, _) = weightings(n, refresh="step", ema=0.5)
    loader = with_indices(DataLoader(train, 4, sampler=sampler))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for made in (alone, shared):
            assert made.start_epoch(epoch)
        torch.testing.assert_close(shared.weights, alone.weights, rtol=SAME, atol=SAME)
        torch.testing.assert_close(shared._direction, alone._direction, rtol=SAME, atol=SAME)
        for indices, batch in loader:
            step = shared.step(batch, indices)
            whole = torch.cat(gathered(indices))
            expected = alone.step(train[whole], whole)
            assert len(expected.weights.unique()) > 1
            torch.testing.assert_close(step.weights, expected.weights.chunk(world)[rank], rtol=SAME, atol=SAME)
            take_steps(plain, model)
        assert shared.weights.isclose(alone.weights).sum() < n  # what the other rank has found is not known yet
        shared.gather()
        torch.testing.assert_close(shared.weights, alone.weights, rtol=SAME, atol=SAME)
        torch.testing.assert_close(shared.phi, alone.phi, rtol=SAME, atol=SAME * float(alone.phi.abs().max()))
    assert torch.equal(*gathered(shared.weights))


def check_shares(rank, world):
    """A solve on some of the samples; shares of unequal size; a rank whose share is all that is asked for."""
    for count in (5, 12, 13):
        _, (shared, _, _, _) = weightings(N, rule="keep_probability", solve_samples=count)
        shared.start_epoch(0)
        weights = gathered(shared.weights)
        assert torch.equal(*weights)
        assert set(weights[0].tolist()) == {0.0, 1.0}
        assert len(shared._places_to_solve(shared._own_places())) == min(count, (13, 12)[rank])
        assert torch.equal(*gathered(shared._generator.get_state()))


def gathered(tensor):
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, tensor.contiguous())
    return found


def take_steps(plain, model):
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=SAME, atol=SAME * float(q.grad.abs().max()))
        with torch.no_grad():
            q -= 0.5 * q.grad
            p.copy_(q)
        p.grad = q.grad = None


def check(rank, world):
    check_epochs(rank, world)
    check_steps(rank, world)
    check_shares(rank, world)


def test_same_as_one_process():
    start(check, 2)
