"""A Distiller with both networks under DistributedDataParallel on two processes, against one that has all samples."""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kdaif_fast import DistillationLoss
from kdaif_fast.distill import Distiller
from tests.distributed.processes import start

from .cases import assert_same_bits, network, samples, sgd, state_of

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

SOLVE = {"tol": 1e-10, "max_iter": 400, "damping": 0.1}


def made(shares, run_dir=None, seed=0, **settings):
    torch.manual_seed(seed)
    teacher, student = network(16).double(), network(8).double()
    if shares:
        teacher, student = DistributedDataParallel(teacher), DistributedDataParallel(student)
    settings = {"warmup_epochs": 0, "influence": SOLVE, "progress": False, **settings}
    settings |= {"loss": DistillationLoss(2.0, 0.5), "group": "world" if shares else None, "run_dir": run_dir}
    return Distiller(teacher, student, sgd, sgd, **settings)


def data(shares):
    found = []
    for count, seed, batch in ((24, 1, 6), (12, 2, 6)):
        x, y, _ = samples(count, seed, 0.2)
        dataset = TensorDataset(x.double(), y)
        sampler = DistributedSampler(dataset, shuffle=False) if shares else None
        # Every second sample, in batches half as large: both together are one of the whole.
        found.append(DataLoader(dataset, batch if shares else 2 * batch, sampler=sampler))
    return found


def check(rank, world, folder):
    for at, settings in enumerate(
        (
            {"mechanism": "M4", "normalize": True},
            {"mechanism": "M3", "refresh": "step"},
            {"mechanism": "M2", "refresh": 2, "accumulate": 2},
        )
    ):
        alone, shared = made(False, **settings), made(True, **settings)
        alone.fit(*data(False), 3)
        shared.fit(*data(True), 3)
        mine, its = state_of(alone), state_of(shared)
        plain = {name.replace("module.", ""): value for name, value in its.items()}
        for name, value in mine.items():
            torch.testing.assert_close(plain[name], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)
        run_dir = folder / str(at)
        made(True, run_dir, **settings).fit(*data(True), 1)
        resumed = made(True, run_dir, seed=3, **settings)
        resumed.fit(*data(True), 3)
        assert_same_bits(its, state_of(resumed))
    check_other_places(rank, folder / "other")


def check_other_places(rank, run_dir):
    """Stopped after one rank has saved, and before another one has."""
    first = made(True, run_dir, checkpoint_every=1)

    def save(original=first._save_run):
        if first.steps == 2 and not first.epoch and rank == 1:
            return
        original()

    first._save_run = save

    def stop(*arguments):
        raise StopIteration

    first._end_epoch = stop
    with pytest.raises(StopIteration):
        first.fit(*data(True), 1)
    second = made(True, run_dir)
    with pytest.raises(ValueError, match=r"checkpoints of the ranks .* steps 2, 1"):
        second.fit(*data(True), 2)
    with pytest.raises(ValueError, match="group is None"):
        Distiller(second.teacher, second.student, sgd, sgd, run_dir=run_dir)


def test_same_as_one_process(tmp_path):
    start(check, 2, tmp_path)
