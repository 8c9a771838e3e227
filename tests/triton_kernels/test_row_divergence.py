"""The Triton kernels of row_divergence without a GPU: run by Triton's interpreter."""

import pytest

from .without_a_gpu import run_under_the_interpreter

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_under_the_interpreter("interpreted_row_divergence.py")


def test_candidates():
    from kdaif_fast.triton_kernels.row_divergence import WIDEST_BLOCK, candidates

    for V in (1, 31, 32, 1000, 4096, 4097, 200_000):
        for tile in (1, 2, 4):
            for block, warps in candidates(V, tile):
                assert block & (block - 1) == 0
                assert block * tile <= WIDEST_BLOCK
                assert block * tile <= 256 * warps or warps == 1
            assert len(candidates(V, tile)) == 1 or WIDEST_BLOCK // tile < V
