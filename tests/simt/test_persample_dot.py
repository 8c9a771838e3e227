"""The CUDA kernels of persample_dot, run on the CPU under several thread schedules, against the reference."""

import ctypes
from ctypes import byref, c_int64, c_void_p

import pytest
import torch

from tests.triton_kernels.persample_cases import assert_close, directions, expected, far_apart, inputs, strided

from .building import CSRC, CXX

ORDERS = {
    **{"forward": 0, "reverse": 1, "odd before even": 2, "random": 3},
    **{"warp by warp": 4, "warp by warp, last first": 5},
}
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# [N, T, I], O, K: one position and several; sizes below, at and beyond those of a tile; tiles of several samples
SIZES = [((1, 1, 1), 1, 1), ((70, 1, 20), 65, 1), ((3, 50, 33), 20, 2), ((2, 64, 16), 64, 1), ((4, 3, 7), 130, 3)]

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


class Call(ctypes.Structure):  # as in persample_dot.cpp
    _fields_ = (
        [(name, c_void_p) for name in ("inputs", "output_grads", "directions", "partial", "dots")]
        + [(f"{name}_strides", c_int64 * 3) for name in ("input", "output", "direction")]
        + [(name, c_int64) for name in ("N", "T", "I", "O", "K", "part", "parts")]
    )


@pytest.fixture
def driver(persample_dot_driver):
    return persample_dot_driver


def run(driver, order, a, b, v, part=64, most_blocks=5):
    (N, T, features), (K, outputs, _) = a.shape, v.shape
    wide = torch.promote_types(a.dtype, torch.float32)
    parts = -(-outputs // part)
    v = v.to(wide)
    partial = torch.full((K, parts, N, T), torch.nan, dtype=wide)
    dots = torch.full((N, K), torch.nan, dtype=wide)
    strides = [(c_int64 * 3)(*x.stride()) for x in (a, b, v)]
    pointers = [x.data_ptr() for x in (a, b, v, partial, dots)]
    call = Call(*pointers, *strides, N, T, features, outputs, K, part, parts)
    driver.persample_dot(TYPES[a.dtype], order, most_blocks, byref(call))
    return dots


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "outputs", "count"), SIZES)
def test_against_reference_under_every_schedule(driver, dtype, shape, outputs, count):
    a, b = inputs(shape, outputs, dtype)
    v = directions(count, outputs, shape[2], dtype)
    first, *others = [run(driver, order, a, b, v) for order in ORDERS.values()]
    assert all(torch.equal(first, other) for other in others)
    assert_close(first, expected("persample_dot", a, b, v), 1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("part", [64, 128, 192])
def test_parts(driver, part):
    a, b = inputs((4, 3, 7), 130, torch.float64)
    v = directions(2, 130, 7, torch.float64)
    assert_close(run(driver, 0, a, b, v, part), expected("persample_dot", a, b, v), 1e-14)


def test_parts_are_whole_tiles_and_enough(driver):
    assert driver.part_of(10**6, 300, 1) == 320  # many positions: no parts
    assert driver.part_of(64, 10**5, 1) == 384  # 261 blocks
    assert driver.part_of(64, 64, 1) == driver.part_of(1, 1, 1) == 64


def test_the_vendor_multiplies_where_there_is_much_to_multiply_and_room_to_store(driver):
    assert driver.vendor_multiplies(256, 784, 512, 1)
    assert not driver.vendor_multiplies(256, 64, 512, 1)  # few features
    assert driver.vendor_multiplies(2**19, 784, 512, 1)
    assert not driver.vendor_multiplies(2**19 + 1, 784, 512, 1)  # more than 1 GiB
    assert not driver.vendor_multiplies(2**17, 784, 512, 8)


def test_strides_and_broadcasts(driver):
    a, b = inputs((5, 3, 20), 18, torch.float32)
    v = directions(2, 18, 20, torch.float32)
    assert torch.equal(run(driver, 0, strided(a), strided(b), strided(v)), run(driver, 0, a, b, v))
    shared = a[:1].expand(5, 3, 20)
    assert torch.equal(run(driver, 0, shared, b, v), run(driver, 0, shared.clone(), b, v))


def test_samples_far_apart(driver):
    """UBSan ends the process where an offset overflows."""
    a, b = inputs((3, 2, 20), 18, torch.float16)
    v = directions(1, 18, 20, torch.float16)
    assert torch.equal(run(driver, 0, far_apart(a), b, v), run(driver, 0, a, b, v))


def test_a_sample_keeps_its_nan_to_itself(driver):
    a, b = inputs((4, 3, 20), 18, torch.float32)
    v = directions(2, 18, 20, torch.float32)
    same = run(driver, 0, a, b, v)
    a[2, 1, 5] = torch.nan
    ours = run(driver, 0, a, b, v)
    assert ours[2].isnan().all()
    assert torch.equal(ours[[0, 1, 3]], same[[0, 1, 3]])


def test_no_positions(driver):
    a, b = torch.zeros(3, 0, 4), torch.zeros(3, 0, 5)
    assert torch.equal(run(driver, 0, a, b, torch.ones(2, 5, 4)), torch.zeros(3, 2))
