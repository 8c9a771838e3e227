"""Per-sample kernels and those of the solvers: shapes, strides and far offsets, by every backend, against float64."""

import pytest
import torch

import kdaif_fast
from tests.triton_kernels.persample_cases import (
    SHAPES,
    assert_close,
    directions,
    expected,
    far_apart,
    inputs,
    rounding_of,
    strided,
    weights,
)

from .calls import backends_of

HERE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = backends_of(HERE)
OPS = ("persample_dot", "persample_norm", "persample_grad", "weighted_grad")
WIDE = (((70, 3, 784), 130), ((4, 128, 256), 192))  # tensor cores, whole tiles and parts of them
# Sums of a thousand products in another order; and what narrow tensor cores drop of theirs.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def others(op, N, outputs, features, dtype):
    """What an op takes besides inputs and output gradients."""
    return {"persample_dot": [directions(2, outputs, features, dtype)], "weighted_grad": [weights(N)]}.get(op, [])


def run(op, *tensors):
    return getattr(torch.ops.kdaif_fast, op)(*tensors)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, op, dtype, device, poisoned_memory):
    shapes = (*SHAPES, *WIDE) if device.type == "cuda" else SHAPES
    if backend == "triton":  # compiled anew for each kind of strides
        shapes = shapes[::3] if dtype == torch.float16 else shapes[1::2]
    for shape, outputs in shapes:
        a, b = inputs(shape, outputs, dtype)
        more = others(op, shape[0], outputs, shape[2], dtype)
        with kdaif_fast.backend(backend):
            ours = run(op, a.to(device), b.to(device), *(x.to(device) for x in more))
        assert_close(ours.cpu(), expected(op, a, b, *more), max(ROUNDING[dtype], rounding_of(dtype)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, op, device, poisoned_memory):
    a, b = inputs((5, 3, 20), 18, torch.float32)
    more = others(op, 5, 18, 20, torch.float32)
    with kdaif_fast.backend(backend):
        ours = run(op, strided(a).to(device), strided(b).to(device), *(x.to(device) for x in more))
    assert_close(ours.cpu(), expected(op, a, b, *more), ROUNDING[torch.float32])
    moved = strided(a).to(device)
    there = torch.empty_strided(a.shape, strided(a).stride(), device=device)
    there.copy_(moved)
    with kdaif_fast.backend(backend):
        ours = run(op, there, b.to(device), *(x.to(device) for x in more))
    assert_close(ours.cpu(), expected(op, a, b, *more), ROUNDING[torch.float32])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend, op, device):
    for N, T, features, outputs in ((0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 3, 2, 0)):
        a, b = torch.ones(N, T, features, device=device), torch.ones(N, T, outputs, device=device)
        more = [x.to(device) for x in others(op, N, outputs, features, torch.float32)]
        with kdaif_fast.backend(backend):
            ours = run(op, a, b, *more)
        assert not ours.any()


@pytest.mark.parametrize("op", OPS)
def test_samples_far_apart(op, gpu):
    """2^31 elements from sample to sample; memory that is given but never written. By whatever is chosen."""
    if torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("less than 32 GiB are free")
    a, b = inputs((3, 3, 20), 18, torch.float16)
    more = others(op, 3, 18, 20, torch.float16)
    memory = torch.empty(2 * 2**31 + 60, dtype=torch.float16, device=gpu)
    there = memory.as_strided(a.shape, (2**31, 20, 1))
    there.copy_(a)
    ours = run(op, there, b.to(gpu), *(x.to(gpu) for x in more))
    assert_close(ours.cpu(), expected(op, a, b, *more), ROUNDING[torch.float16])


def test_far_apart_is_what_it_says():
    """The same layout as on the CPU, where memory that is not touched costs nothing."""
    a = inputs((2, 3, 20), 18, torch.float16)[0]
    assert far_apart(a).stride() == (2**31, 20, 1)


@pytest.mark.parametrize("P", [1, 2047, 2048, 100_003])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cg_update_and_dots(backend, P, device, poisoned_memory):
    """Steps of 0 leave a column alone, whatever its direction holds."""
    K = 5
    x, r, p, Ap, best = torch.randn(5, K, P).unbind()
    steps, keep = torch.tensor([0.5, 0.0, -1.0, 2.0, 0.25]), torch.tensor([True, False, True, False, False])
    p[1], Ap[1] = torch.nan, torch.inf
    ours = [z.clone().to(device) for z in (x, r, p, Ap, best)]
    with kdaif_fast.backend(backend):
        squares = torch.ops.kdaif_fast.cg_update(
            ours[0], ours[1], ours[2], ours[3], steps.to(device), 0.1, ours[4], keep.to(device)
        )
        dots = torch.ops.kdaif_fast.cg_dots(ours[0], ours[1])
    wide = [z.double() for z in (x, r, p, Ap)]
    moves = (steps != 0)[:, None]
    new_x = torch.where(moves, wide[0] + steps[:, None] * wide[2], wide[0])
    new_r = torch.where(moves, wide[1] - steps[:, None] * (wide[3] + 0.1 * wide[2]), wide[1])
    assert_close(ours[0].cpu(), new_x)
    assert_close(ours[1].cpu(), new_r)
    assert torch.equal(ours[4].cpu(), torch.where(keep[:, None], x, best))
    assert_close(squares.cpu(), new_r.square().sum(1), 1e-5)
    assert_close(dots.cpu(), torch.stack(((new_x * new_r).sum(1), new_x.square().sum(1))), 1e-5)
