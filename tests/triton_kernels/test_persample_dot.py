"""The Triton kernels of persample_dot without a GPU: run by Triton's interpreter."""

import pytest

from .without_a_gpu import run_under_the_interpreter

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_under_the_interpreter("interpreted_persample_dot.py")
