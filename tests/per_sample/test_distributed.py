"""weighted_step on a DistributedDataParallel model: every process ends up with the mean of all gradients."""

import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kdaif_fast.per_sample import per_sample_grad_dots, weighted_step

WORLD = 2

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")


def model_and_batches():
    torch.manual_seed(0)
    scaled = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(
        nn.Conv1d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(6, 6), nn.Tanh(), scaled, nn.Linear(6, 3)
    )
    nn.init.zeros_(model[-1].weight)  # nothing below gets a gradient at first
    batches = [(torch.randn(4, 2, 3), torch.randint(3, (4,)), torch.rand(4)) for _ in range(3 * WORLD)]
    return model.double(), [(x.double(), y, w.double()) for x, y, w in batches]


def work(rank, port):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        model, batches = model_and_batches()
        expected, _ = model_and_batches()
        model = DistributedDataParallel(model, bucket_cap_mb=0.0001)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, expected)]
        direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        for turn in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x, y, weights = batches[WORLD * turn + rank]
            step = weighted_step(model, (x, y), weights, direction=direction if turn else None)
            total = torch.zeros((), dtype=torch.float64)
            for x, y, weights in batches[WORLD * turn : WORLD * (turn + 1)]:
                total = total + (weights * F.cross_entropy(expected(x), y, reduction="none")).mean() / WORLD
            total.backward()
            for p, q in zip(model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-12)
            if turn:
                dots = per_sample_grad_dots(model, batches[WORLD * turn + rank][:2], direction)
                torch.testing.assert_close(step.phi, -dots)
            for optimizer in optimizers:
                optimizer.step()
        # Gradients that are accumulated without talking, and reduced at the last step.
        model.zero_grad()
        expected.zero_grad()
        with model.no_sync():
            weighted_step(model, batches[rank][:2], batches[rank][2])
        weighted_step(model, batches[WORLD + rank][:2], batches[WORLD + rank][2])
        for x, y, weights in batches[: 2 * WORLD]:
            ((weights * F.cross_entropy(expected(x), y, reduction="none")).mean() / WORLD).backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-12)
    finally:
        distributed.destroy_process_group()


def test_gradients_are_averaged_over_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port,), nprocs=WORLD)
