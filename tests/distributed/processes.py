"""Starts a function in several processes that can talk over gloo."""

import datetime
import socket

import torch
from torch import distributed, multiprocessing

PATIENCE = datetime.timedelta(seconds=60)
"""After this long a rank that waits for another one raises: tests shall fail then, not hang."""


def _work(rank, world, port, function, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        function(rank, world, *arguments)
        distributed.barrier()  # nobody leaves while others still talk
    finally:
        distributed.destroy_process_group()


def start(function, world, *arguments):
    """function(rank, world, *arguments) in `world` processes; raises what the first one that fails raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_work, args=(world, port, function, arguments), nprocs=world)
