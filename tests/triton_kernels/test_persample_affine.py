"""The Triton kernel of layer and group norms without a GPU: run by Triton's interpreter, and how it is launched."""

import pytest

from .without_a_gpu import run_under_the_interpreter

pytest.importorskip("triton")

from kdaif_fast.triton_kernels.affine_sums import launch_for
from kdaif_fast.triton_kernels.persample_tiles import ENOUGH_PROGRAMS
from kdaif_fast.triton_kernels.strided_sums import COLUMNS_ARE_FAST, ROWS_ARE_FAST


def test_under_the_interpreter():
    run_under_the_interpreter("interpreted_persample_affine.py")


@pytest.mark.parametrize("fast", [ROWS_ARE_FAST, COLUMNS_ARE_FAST])
def test_launches_cover_everything_and_keep_a_gpu_busy(fast):
    for samples, kept, summed in ((1, 1, 1), (16, 768, 512), (128, 64, 3136), (1, 8, 10**7), (2**31, 3, 1)):
        for alignment in (1, 8):
            launch = launch_for(samples, kept, summed, fast, alignment)
            assert (launch.blocks - 1) * launch.rows < kept <= launch.blocks * launch.rows
            part = launch.part * launch.columns
            assert (launch.parts - 1) * part < summed <= launch.parts * part
            assert launch.parts <= ENOUGH_PROGRAMS  # of a grid's second axis
            if samples * launch.blocks < ENOUGH_PROGRAMS and summed >= 10**7:
                assert samples * launch.blocks * launch.parts > ENOUGH_PROGRAMS // 2
