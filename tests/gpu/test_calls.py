"""Every op, by every backend that can answer, against the definitions in float64."""

import contextlib
from pathlib import Path

import pytest
import torch

import kdaif_fast
from kdaif_fast import ops

from .calls import CALLS, COMPILED, KERNELS, TOLERANCE, backends_of, dtypes_of, error, expected, on

HERE = "cuda" if torch.cuda.is_available() else "cpu"
# A Triton kernel is compiled anew for each dtype, which takes seconds; what reaches the same kernel is called in one.
CASES = [
    (name, dtype, backend)
    for name in CALLS
    for dtype in dtypes_of(name)
    for backend in ("chosen", *backends_of(HERE))
    if backend != "triton" or dtype != torch.float64
    if backend != "triton" or name in KERNELS
    if backend != "cuda" or name in COMPILED
    if not (backend == "chosen" and dtype == torch.float16)
]
IDS = [f"{name}, {str(dtype).removeprefix('torch.')}, {backend}" for name, dtype, backend in CASES]


@pytest.mark.parametrize(("name", "dtype", "backend"), CASES, ids=IDS)
def test_call(name, dtype, backend, device, poisoned_memory):
    call = CALLS[name]
    tensors = call.make(dtype)
    tensors = on(device, tensors)
    with contextlib.nullcontext() if backend == "chosen" else kdaif_fast.backend(backend):
        results = call.run(*tensors)
    assert error(results, expected(call, tensors)) <= TOLERANCE[dtype]


def test_every_public_op_is_called():
    text = (Path(__file__).parent / "calls.py").read_text()
    assert [name for name in ops.__all__ if name not in text and name != "RowStats"] == []


def test_what_is_compiled():
    """The table above is of the sources that there are."""
    sources = {path.stem for path in (Path(__file__).parents[2] / "csrc/cuda").glob("*.cu")}
    families = {"row_divergence": ("kd_loss", "kd_loss gradient", "row_hvp")}
    named = {name: next((f for f, names in families.items() if name in names), name) for name in COMPILED}
    assert {source for source in sources if source in named.values()} == set(named.values())
    others = {name for name in KERNELS if name not in COMPILED and "," not in name}
    assert not others & sources
