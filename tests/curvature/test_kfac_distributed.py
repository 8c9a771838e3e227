"""K-FAC's statistics over the shards of several processes, against those of all samples in one."""

import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn

from kdaif_fast.curvature import EKFAC, KFAC

WORLD = 2
SIZES = (5, 3, 4)  # batches: the first two are rank 0's

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")


class Switching(nn.Module):
    """One layer is a layer for some batches only; the norm and the table have diagonal blocks."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.norm(self.table(tokens))
        x = self.layer(x) if len(tokens) != SIZES[2] else x * self.layer.weight.diagonal() + self.layer.bias
        return self.head(torch.tanh(x)).mean(1)


def model_and_batches():
    torch.manual_seed(0)
    batches = [(torch.randint(6, (n, 3)), torch.randint(3, (n,))) for n in SIZES]
    return Switching().double(), batches


def work(rank, port):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        model, batches = model_and_batches()
        own = batches[:2] if rank == 0 else batches[2:]
        for kind in (KFAC, EKFAC):
            for fisher in ("ggn", "empirical"):
                expected, shared = kind(model, batches, fisher=fisher), kind(model, own, fisher=fisher, group="world")
                assert shared.blocks == expected.blocks
                assert shared.blocks["layer.weight"] == "diagonal"
                assert shared.blocks["head.weight"] == "kronecker"
                assert shared.samples == sum(SIZES)
                torch.testing.assert_close(shared.dense(), expected.dense(), rtol=1e-9, atol=1e-11)
        head = dict(params=["head", "norm"], fisher="empirical")  # a rank without data has its share of the sums
        expected, shared = EKFAC(model, batches[:1], **head), EKFAC(model, batches[rank:1], **head, group="world")
        torch.testing.assert_close(shared.dense(), expected.dense(), rtol=1e-9, atol=1e-11)
        bad = [(tokens, targets + 5 * rank) for tokens, targets in own]
        with pytest.raises((ValueError, RuntimeError), match="rank" if rank == 0 else "label|target|class"):
            EKFAC(model, bad, group="world").diagonal()
        drawn = EKFAC(model, own, group="world").diagonal()
        first = drawn.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(drawn, first)  # the same everywhere, and finite
        assert drawn.sum() > 0.01
    finally:
        distributed.destroy_process_group()


def test_ranks_share_their_samples():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(work, (port,), WORLD)


def test_group_without_processes():
    model, batches = model_and_batches()
    with pytest.raises(RuntimeError, match="not initialised"):
        EKFAC(model, batches, group="world").diagonal()
