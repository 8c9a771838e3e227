"""Started by torchrun: products and a solve with samples shared out over processes."""

import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.test_curvature import check_products

if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        check_products(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
