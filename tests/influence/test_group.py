"""Scores over several processes, each with its own shards: those of one process with all of the data."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from kdaif_fast import influence_scores
from kdaif_fast.influence.array_files import ArrayFile
from tests.cases import make
from tests.influence.test_streaming import pieces

WORLD = 2
OPTIONS = {"damping": "auto", "tol": 1e-10, "max_iter": 500}
FIRST = 7  # samples of the first rank, the other has five

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")


def shard(data, first, rank):
    return tuple(part[:first] if rank == 0 else part[first:] for part in data)


def work(rank, port, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(0)
        model, batch, val = make("mlp")
        val[1][:] = torch.tensor([0, 0, 1, 1, 2, 2, 2])  # the first rank has no sample of class 2
        train, validation = shard(batch, FIRST, rank), shard(val, 4, rank)
        for queries in ("mean", "per_class", "per_sample"):
            expected = influence_scores(model, batch, val, queries=queries, **OPTIONS)
            mine = expected[:FIRST] if rank == 0 else expected[FIRST:]
            for given in (train, pieces(train, 2)):
                phi = influence_scores(model, given, pieces(validation, 2), queries=queries, group="world", **OPTIONS)
                torch.testing.assert_close(phi, mine, rtol=1e-6, atol=1e-9)
        # A ranking that has settled ends the solve of all ranks together.
        ranked = influence_scores(model, train, validation, group="world", damping=0.1, tol="rank")
        converged = influence_scores(model, train, validation, group="world", damping=0.1, tol=1e-6)
        torch.testing.assert_close(ranked, converged, rtol=1e-2, atol=1e-3)
        with pytest.raises(ValueError, match=r"must contain '\{rank\}'"):
            influence_scores(model, train, validation, group="world", out=f"{folder}/phi.npy")
        out = folder + "/phi{rank}.npy"
        phi = influence_scores(model, train, validation, group="world", out=out, **OPTIONS)
        path = out.replace("{rank}", str(rank))
        assert np.array_equal(ArrayFile.open(Path(path)).values, phi.numpy())
        # One rank has lost its solution: nobody goes on without the other.
        if rank == 1:
            Path(path + ".solution.npy").unlink()
            Path(path).unlink()
            Path(path + ".progress.json").unlink()
        distributed.barrier()
        again = influence_scores(model, train, validation, group="world", out=out, **OPTIONS)
        torch.testing.assert_close(again, phi, rtol=1e-9, atol=1e-12)
    finally:
        distributed.destroy_process_group()


def test_two_ranks_and_one_process_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), WORLD)
