"""What the Triton launchers ask for at sizes that no test can hold: grids, offsets and workspaces, without memory."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from kdaif_fast.reference.row_terms import KL, LOGITS
from kdaif_fast.triton_kernels import (
    cg_update,
    grids,
    persample_dot,
    persample_grad,
    persample_norm,
    row_divergence,
    row_stats,
    weighted_grad,
)

from .compiling import launching
from .launches import PLAIN, empty, row_arguments


def launched(call, *args):
    """(arguments by name, grid) of the launches."""
    found = []

    def note(function, args, grid, named):
        given = dict(zip(function.arg_names, args, strict=False)) | named
        found.append((given, grid(given) if callable(grid) else grid))

    with launching(note, 90):
        result = call(*args)
    assert found
    return found, result


def fits(grid):
    """As a GPU takes it."""
    return grid[0] < 2**31 and all(side < 2**16 for side in grid[1:])


def covers(count, size, most):
    """Whether so many parts of this size are just enough."""
    return (count - 1) * size < most <= count * size


@pytest.mark.parametrize(("N", "V"), [(2**20, 2**20), (2**31 - 1, 2), (1, 2**30)])
def test_rows(N, V):
    args = row_arguments(KL, LOGITS, (N, V), torch.bfloat16, PLAIN)
    found, (loss, grad) = launched(row_divergence.row_divergence_with_grad, *args)
    assert {grid for _, grid in found} == {(N,)}
    assert (loss.shape, grad.shape) == ((N,), (N, V))
    found, stats = launched(row_stats.row_stats, args[0], args[1], args[4], 1.0, 0, V, -100)
    assert {grid for _, grid in found} == {(N,)}
    assert [x.shape for x in stats] == [(14, N), (2, N)]
    tangents = empty(9, N, V, dtype=torch.bfloat16)
    found, out = launched(row_divergence.row_divergence_hvp, tangents, True, *args)
    assert {grid for _, grid in found} == {(N, 3)}
    assert all(given["tangent_stride"] == N * V for given, _ in found)
    assert out.shape == tangents.shape


def test_more_rows_than_programs():
    args = row_arguments(KL, LOGITS, (2**31, 2), torch.bfloat16, PLAIN)
    for call in (
        lambda: row_divergence.row_divergence(*args),
        lambda: row_divergence.row_divergence_hvp(empty(1, 2**31, 2), True, *args),
        lambda: row_stats.row_stats(args[0], None, None, 1.0, 0, 0, -100),
    ):
        with pytest.raises(ValueError, match="2147483648, expected at most 2147483647; pass fewer rows at a time"):
            launched(call)
    few = row_arguments(KL, LOGITS, (1, 2), torch.float32, PLAIN)
    launched(row_divergence.row_divergence_hvp, empty(4 * 65535, 1, 2), True, *few)
    with pytest.raises(ValueError, match="65536, expected at most 65535; pass fewer tangents"):
        launched(row_divergence.row_divergence_hvp, empty(4 * 65535 + 1, 1, 2), True, *few)


def test_programs():
    assert grids.programs("op", 2**15, 2**15) == 2**30
    assert grids.programs("op", 2**31 - 1) == 2**31 - 1
    with pytest.raises(ValueError, match="op: one side"):
        grids.programs("op", 2**16, 2**15)


@pytest.mark.parametrize(("K", "P"), [(1, 2**40), (8, 2**36 + 1), (2**20, 3)])
def test_vectors(K, P):
    x, r, p, Ap = (empty(K, P) for _ in range(4))
    found, dots = launched(cg_update.cg_update, x, r, p, Ap, empty(K), 0.1)
    found_dots, both = launched(cg_update.cg_dots, p, Ap)
    assert (dots.shape, both.shape) == ((K,), (2, K))
    for given, grid in found + found_dots:
        assert fits(grid)
        assert grid == (K * given["chunks"],)
        assert covers(given["chunks"], given["CHUNK"], P)
        assert given["partial"].numel() in (grid[0], 2 * grid[0])
        assert given["p_stride"] == P


# [N, T, I], O: beyond 2^31 and 2^40 elements; of one sample; of many samples; of the result.
HUGE = [((2**14, 2**13, 2**13), 2**13), ((1, 2**20, 2**14), 2**14), ((2**22, 1, 2**14), 10), ((4, 2, 2**16), 2**16)]


@pytest.mark.parametrize(("shape", "outputs"), HUGE)
@pytest.mark.parametrize("module", [persample_dot, persample_grad, persample_norm, weighted_grad])
def test_layers(module, shape, outputs):
    N, T, features = shape
    name = module.__name__.split(".")[-1]
    a, b = empty(shape, dtype=torch.bfloat16), empty(N, T, outputs, dtype=torch.bfloat16)
    more = {"persample_dot": [empty(2, outputs, features, dtype=a.dtype)], "weighted_grad": [empty(N)]}.get(name, [])
    found, result = launched(getattr(module, name), a, b, *more)
    expected = {
        "persample_dot": (N, 2),
        "persample_grad": (N, outputs, features),
        "persample_norm": (N,),
        "weighted_grad": (outputs, features),
    }
    assert result.shape == expected[name]
    for given, grid in found:
        assert fits(grid)
        if given.get("INDEX") is tl.int32:
            assert tile_extent(given, shape, outputs) < 2**31
        for workspace in ("partial", "sums"):
            if workspace in given:
                assert math.prod(given[workspace].shape) < 2**40 or name == "persample_norm"


def tile_extent(given, shape, outputs):
    """Elements between what one program reads of one sample, at least: a lower bound of what offsets must hold."""
    inner = [("a_position", "T"), ("a_feature", "features"), ("b_position", "T"), ("b_feature", "outputs")]
    spans = [given[stride] * (min(given[size], 256) - 1) for stride, size in inner if stride in given and size in given]
    return max(spans)


def test_small_tiles_far_apart_take_wide_offsets():
    """Neighbouring samples of one tile, positions, and features: each of them 2^31 elements apart."""
    for strides in ((2**31, 5, 1), (40, 2**31, 1), (40, 1, 2**31)):
        a = empty(2**34, dtype=torch.float32).as_strided((3, 2, 5), strides)
        b = empty(3, 2, 6)
        for module, more in ((persample_dot, [empty(1, 6, 5)]), (weighted_grad, [empty(3)])):
            found, _ = launched(getattr(module, module.__name__.split(".")[-1]), a, b, *more)
            assert {given["INDEX"] for given, _ in found} == {tl.int64}
        for module in (persample_grad, persample_norm):
            found, _ = launched(getattr(module, module.__name__.split(".")[-1]), a, b)
            wide = {given["INDEX"] for given, _ in found if "INDEX" in given}
            assert wide == {tl.int64 if strides[0] < 2**31 else tl.int32}  # a program has one sample
